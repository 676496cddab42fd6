"""The shipped demo model on its way into the cache: once, complete or not at all, with what serving installs."""

import hashlib
import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conf.schema import ConfigError, RandomShape
from demo import bundle
from demo.checkpoint import DEMO, config_json
from demo.training import model, packing
from demo.training.data import STOPS
from engine.architecture import Architecture
from tests.harness import InProcess

ROOT = Path(__file__).parents[2]
SHAPE = {
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL = Architecture.from_random_shape(RandomShape(**SHAPE))
CONFIG = config_json(SMALL, "huggingface")
TOKENS = [*range(300), 200002]

# A process that makes the small model's folder, says when it writes, takes its time, and may die before it is done.
MAKE = f"""
import os, sys, time
from pathlib import Path
import safetensors.torch
from demo import bundle
bundle.CONFIG = {CONFIG}
save = safetensors.torch.save_file
def reporting(*args, **options):
    print("writing", flush=True)
    save(*args, **options)
    time.sleep(0.5)
    if "crash" in sys.argv: os._exit(3)
safetensors.torch.save_file = reporting
print(bundle.demo_folder(Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    path = tmp_path_factory.mktemp("shipped") / "model.safetensors"
    packing.write(path, model.initial(SMALL, len(TOKENS) + 1, 0, "cpu"), TOKENS)
    return path


@pytest.fixture
def copy(shipped, tmp_path):
    for file in (shipped, shipped.with_suffix(".sha256")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / shipped.name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle, "CONFIG", CONFIG)
    return tmp_path / "cache" / "mini-vllm"


def contents(cache):
    return sorted(entry.name for entry in cache.glob("*") if entry.suffix != ".lock")


def start(shipped, cache, *words):
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, str(shipped), *words],
        text=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "XDG_CACHE_HOME": str(cache.parent)},
    )


def test_what_ships_is_whole_and_of_the_demo_architecture():
    w, tokens = packing.unpack(bundle.read(bundle.SHIPPED, bundle.digest_of(bundle.SHIPPED)))
    expected = model.initial(DEMO, len(tokens) + 1, 0, "cpu")
    assert {name: p.shape for name, p in w.items()} == {name: p.shape for name, p in expected.items()}
    assert {*STOPS} <= {*tokens}


def test_the_config_is_what_the_checkpoint_writer_writes_for_its_architecture():
    assert config_json(DEMO, "huggingface") == bundle.CONFIG


def test_the_bundle_needs_neither_the_engine_nor_training_nor_torch():
    code = "import sys, demo.bundle; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "conf" in loaded
    assert not loaded & {"engine", "graphs", "kernels", "serve", "torch"}
    assert "demo.training" not in done.stdout.split()


def test_the_folder_is_made_once_and_served(shipped, cache):
    folder = bundle.demo_folder(shipped)
    assert contents(cache) == [folder.name]
    first = (folder / "model.safetensors").stat()
    assert bundle.demo_folder(shipped) == folder
    assert (folder / "model.safetensors").stat() == first
    (answer,) = InProcess(folder).generate([1, 2, 3], max_tokens=4)
    assert len(answer) == 4


def test_another_model_is_another_folder(shipped, cache, tmp_path):
    other = tmp_path / "model.safetensors"
    packing.write(other, model.initial(SMALL, len(TOKENS) + 1, 1, "cpu"), TOKENS)
    assert bundle.demo_folder(shipped) != bundle.demo_folder(other)
    assert len(contents(cache)) == 2


def test_processes_make_it_once_whatever_a_crash_left(shipped, cache):
    crashed = start(shipped, cache, "crash")
    assert crashed.communicate()[0].split() == ["writing"]
    assert crashed.returncode == 3
    (partial,) = cache.glob("*.partial")
    (partial / "leftover.safetensors").write_bytes(b"")

    makers = [start(shipped, cache) for _ in range(3)]
    outputs = [maker.communicate()[0].split() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert sorted(map(len, outputs)) == [1, 1, 2]  # one wrote, the others waited
    assert len({output[-1] for output in outputs}) == 1
    folder = Path(outputs[0][-1])
    assert contents(cache) == [folder.name]
    assert contents(folder) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "gone"])
def test_a_damaged_bundle_is_named_and_leaves_nothing(copy, cache, damage):
    data = bytearray(copy.read_bytes())
    if damage == "gone":
        copy.unlink()
    else:
        data[-100] ^= damage == "changed"
        copy.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage)])
    with pytest.raises(ConfigError, match=f"{copy}: found"):
        bundle.demo_folder(copy)
    assert contents(cache) == []


@pytest.mark.parametrize("damage", ["empty", "changed", "gone"])
def test_a_damaged_hash_is_named(copy, cache, damage):
    beside = copy.with_suffix(".sha256")
    if damage == "gone":
        beside.unlink()
    else:
        beside.write_text("" if damage == "empty" else hashlib.sha256(b"").hexdigest()[:-1] + "?")
    with pytest.raises(ConfigError, match=f"{beside}: found"):
        bundle.demo_folder(copy)
    assert contents(cache) == []


def test_a_full_disk_is_said_and_leaves_nothing(shipped, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(ConfigError, match=rf"{cache}/demo-\w+\.partial: .*needs about 220 MB there"):
            bundle.demo_folder(shipped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(cache) == []


def test_serving_needs_only_what_serving_installs(shipped, cache):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    absent = {requirement.partition(">")[0] for extra in ("demo", "sweep", "test") for requirement in extras[extra]}
    assert {"babel", "pytest", "httpx"} <= absent
    missing = f"import sys; sys.modules |= dict.fromkeys({sorted(absent)})"  # as if they were not installed
    done = subprocess.run(
        [sys.executable, "-c", f"{missing}\nimport serve.app, engine.llm, engine.rank\n{MAKE}", str(shipped)],
        text=True,
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache.parent)},
    )
    assert done.returncode == 0, done.stderr
