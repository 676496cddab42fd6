"""What `python serve.py …` makes of its arguments: run for real, up to the point where ranks would start."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
