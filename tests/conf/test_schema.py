"""What `python serve.py …` makes of its arguments: run for real, up to the point where ranks would start."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conf.schema import GPT_OSS_20B, GPT_OSS_120B, ConfigError, Weights, check, compose

ROOT = Path(__file__).parents[2]


def serve(*arguments):
    return subprocess.run(
        [sys.executable, "serve.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("argument", ["tp=2", "+tp=2", "++tp=2"])
def test_the_number_of_ranks_is_given_in_any_of_hydras_ways(argument):
    assert yaml.safe_load(serve(argument, "--cfg", "job").stdout)["tp"] == 2


def test_the_resolved_configuration_is_printed_whole():
    config = yaml.safe_load(serve("model=gpt-oss-20b", "model.weights=random", "--cfg", "job").stdout)
    assert config["model"]["random_shape"]["num_hidden_layers"] == 24
    assert config["model"]["weights"] == "random"
    assert config["buckets"]["decode_rows"] == [1, 2, 4, 8, 16, 32, 64]
    assert config["server"]["port"] == 8000


def test_a_models_buckets_give_way_to_those_asked_for():
    config = yaml.safe_load(serve("model=gpt-oss-120b", "buckets=latency", "--cfg", "job").stdout)
    assert config["model"]["random_shape"]["num_local_experts"] == 128
    assert config["buckets"]["max_context"] == 131072


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tpp=2"], ["tpp"]),
        (["+tpp=2"], ["tpp", "not in 'Composed'"]),
        (["model.weigths=random"], ["model.weigths"]),
        (["server.port=abc"], ["server.port", "'abc'", "Integer"]),
        (["server.port=99999"], ["server.port", "99999", "1 to 65535"]),
        (["model=gpt-oss-21b"], ["gpt-oss-21b", "gpt-oss-20b", "gpt-oss-120b"]),
        (["model=gpt-oss-20b"], ["model.path", "None", "model.weights=random"]),
        (["model.weights=bogus"], ["model.weights", "bogus", "checkpoint", "random", "demo"]),
        (["tp=3"], ["tp", "3", "1, 2, 4 or 8"]),
        (["buckets.decode_rows=[4,2]"], ["buckets.decode_rows", "[4, 2]", "ascending"]),
        (["buckets.decode_rows=[]"], ["buckets.decode_rows", "[]"]),
        (["buckets.decode_rows=[1,512]"], ["buckets.decode_rows", "512", "256 rows"]),
        (["buckets.prefill_tokens=[32]"], ["buckets.prefill_tokens", "64"]),
        (["buckets.prompt_logprobs=[64,4096]"], ["buckets.prompt_logprobs", "64 to 1024 tokens"]),
        (["buckets.max_context=1000"], ["buckets.max_context", "1000", "multiple of 64"]),
        (["server.api_key_file=/nowhere/keys"], ["server.api_key_file", "/nowhere/keys"]),
    ],
    ids=str,
)
def test_what_cannot_run_stops_the_start_with_one_line(arguments, words):
    result = serve(*arguments)
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("overrides", "ranks"), [([], 1), (["tp=null"], 1), (["tp=2"], 2), (["+tp=2"], 2), (["++tp=2"], 2)], ids=str
)
def test_a_loaded_configuration_has_a_number_of_ranks(overrides, ranks):
    tp = compose(overrides).tp
    assert type(tp) is int
    assert tp == ranks


def test_no_ranks_are_not_one_rank():
    with pytest.raises(ConfigError, match="tp: got 0, allowed: 1, 2, 4 or 8"):
        compose(["tp=0"])


@pytest.mark.parametrize(("name", "shape"), [("gpt-oss-20b", GPT_OSS_20B), ("gpt-oss-120b", GPT_OSS_120B)])
def test_the_published_models_have_their_shapes(name, shape):
    assert compose([f"model={name}", "model.weights=random"]).model.random_shape == shape


CHECKPOINT = ["model=gpt-oss-120b", "model.path=/x"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.path=/x"], ["model.path: got '/x'", "model.weights=demo"]),
        (["model=gpt-oss-20b", "model.weights=random", "model.path=/x"], ["model.path: got '/x'", "random"]),
        (["model.random_shape.hidden_size=64"], ["model.random_shape: got", "hidden_size=64", "model.weights=demo"]),
        ([*CHECKPOINT, "model.random_shape.head_dim=32"], ["model.random_shape: got", "head_dim=32", "checkpoint"]),
        (["buckets.pages=9", "buckets.page_memory=0.5"], ["buckets.page_memory: got 0.5", "buckets.pages=9"]),
        (["kernels=hopper", "kernels.dtype=float32"], ["kernels.dtype: got float32", "bfloat16", "hopper"]),
        (["kernels=hopper", "kernels.device=cpu"], ["kernels.device: got cpu", "kernels.name=hopper"]),
        (["server.stored_responses=0", "server.stored_bytes=9"], ["server.stored_bytes: got 9", "stored_responses=0"]),
        (["server.stored_responses=0", "server.stored_seconds=9"], ["server.stored_seconds: got 9.0", "responses=0"]),
    ],
    ids=str,
)
def test_a_key_that_the_rest_leaves_without_effect_stops_the_start(overrides, words):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "origins", ["'*'", "'https://*'", "'https://*.a.example'", "'null'", "a.example", "'https://a.example/'", "''"]
)
def test_an_origin_is_given_in_full(origins):
    with pytest.raises(ConfigError, match=r"server\.cors_origins: got .*no wildcard") as error:
        compose([f"server.cors_origins=['https://a.example',{origins}]"])
    assert "\n" not in str(error.value)
    whole = ["https://a.example", "http://127.0.0.1:3000"]
    assert compose([f"server.cors_origins={whole}"]).server.cors_origins == whole


def test_a_salt_for_each_key_needs_keys():
    with pytest.raises(ConfigError, match=r"server\.salt_by_key: got False, allowed: .* without server\.api_key_file"):
        compose(["server.salt_by_key=false"])
    assert compose([]).server.salt_by_key
    assert not compose(["server.salt_by_key=false", "server.api_key_file=/x"]).server.salt_by_key


@pytest.mark.parametrize(
    ("key", "value"), [("stored_responses", -1), ("stored_bytes", 0), ("stored_seconds", 0), ("stored_seconds", -1.0)]
)
def test_bounds_of_the_store_are_positive(key, value):
    with pytest.raises(ConfigError, match=f"server.{key}: got {value}"):
        compose([f"server.{key}={value}"])


def test_keys_that_do_have_an_effect_pass():
    compose(["server.stored_responses=0"])
    compose(["server.stored_responses=9", "server.stored_bytes=1000", "server.stored_seconds=0.5"])
    compose(CHECKPOINT)
    compose(["model=gpt-oss-120b", "model.weights=random", "model.random_shape.num_hidden_layers=2"])
    compose(["buckets.page_memory=0.5"])
    compose(["kernels=reference", "kernels.dtype=float32"])


def test_weights_of_a_folder_take_the_place_of_others():
    config = compose(["buckets.pages=9"]).with_checkpoint(Path("/somewhere"))
    assert (config.model.weights, config.model.path) == (Weights.checkpoint, "/somewhere")
    assert config.buckets.pages == 9
    check(config)


def test_what_hydra_refuses_is_a_configuration_error_of_one_line():
    with pytest.raises(ConfigError, match="gpt-oss-21b") as error:
        compose(["model=gpt-oss-21b"])
    assert "\n" not in str(error.value)
