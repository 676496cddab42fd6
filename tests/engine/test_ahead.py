"""What is compiled ahead of time is what serving loads, and suffices on a machine that cannot compile."""

import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conf.schema import RandomShape
from engine import ahead
from engine import weights as shards
from engine.architecture import Architecture
from engine.model import Model
from graphs.buckets import Buckets
from graphs.buffers import Buffers
from kernels import build, hopper
from kernels.ops import Peers

CPU = torch.device("cpu")
# Few layers, experts and tokens: a test of its own says that no kernel is compiled for their number.
SHAPE = replace(Architecture.from_random_shape(RandomShape()), layers=2, windows=(128, None), experts=12, vocab=65_600)
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")), reason="no nvcc on this machine"
)


class NoModule:
    """A module whose kernels do nothing."""

    def kernel(self, *_, **__):
        return SimpleNamespace(launch=lambda *_, **__: None, resident_clusters=lambda *_: 16)


@pytest.fixture
def compiled(monkeypatch):
    """The units that the wrappers have compiled, on a machine that pretends to have a GPU; launches do nothing."""
    units = set()

    def compile_module(source, defines=None):
        assert source.exists()
        units.add(ahead.Unit(str(source.relative_to(ahead.FOLDER)), tuple(sorted((defines or {}).items()))))
        return NoModule()

    monkeypatch.setattr(build, "compile_module", compile_module)
    monkeypatch.setattr(hopper.attention, "_counters", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    yield units
    for cached in (build._kernel, hopper.attention._multiprocessors):  # of a machine that is not there
        cached.cache_clear()


@pytest.mark.parametrize(("rank", "tp"), [(0, 1), (1, 2), (0, 4), (3, 4), (0, 8), (7, 8)])
def test_the_list_is_what_a_ranks_steps_ask_for(compiled, rank, tp):
    specs = shards.tensor_specs(SHAPE)
    weights = shards.assemble(
        SHAPE, rank, tp, CPU, torch.bfloat16, lambda name, index: torch.zeros(()).expand(specs[name].shape)[index]
    )
    ranks = SimpleNamespace(rank=rank, size=tp)
    model = Model(SHAPE, weights, hopper, Peers(ranks), max_context=1024)
    buckets = Buckets.of([1, 2, 8, 16, 64, 66, 96, 128, 192, 256], [64, 80, 256], 4, [256])
    buffers = Buffers(
        buckets=buckets,
        layers=SHAPE.layers,
        kv_heads=SHAPE.kv_heads // tp,
        head_dim=SHAPE.head_dim,
        vocab=SHAPE.vocab,
        max_context=1024,
        pages=2,
        device=CPU,
        dtype=torch.bfloat16,
    )
    for bucket in buckets.all:
        model.step(bucket, buffers)()
    # Which tiles a prefill's dense layers take depends on its tokens, and buckets may be of any.
    listed = ahead.units(SHAPE, rank, tp)
    assert compiled <= listed
    assert {unit.file for unit in listed - compiled} == {"linear/prefill.cu"}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_one_list_serves_both_models(tp):
    small = Architecture.from_random_shape(RandomShape())
    large = Architecture.from_random_shape(RandomShape(num_hidden_layers=36, num_local_experts=128))
    for rank in range(tp):
        assert ahead.units(small, rank, tp) == ahead.units(large, rank, tp)
        assert ahead.units(small, rank, tp) == ahead.units(SHAPE, rank, tp)


def test_ranks_with_a_block_more_than_others_have_kernels_of_their_own():
    of_ranks = [ahead.units(SHAPE, rank, 8) for rank in range(8)]
    inner = {dict(unit.defines)["INTER"] for units in of_ranks for unit in units if unit.file == "experts/decode.cu"}
    assert inner == {352, 384}


FILES = {unit.file: unit for unit in sorted(ahead.units(SHAPE, 0, 2))}


@needs_nvcc
@pytest.mark.parametrize("file", FILES)
def test_in_wait_first_every_kernel_waits_before_it_touches_memory_or_lets_another_start(file, tmp_path):
    defines = [f"-D{name}={value}" for name, value in (*FILES[file].defines, ("WAIT_FIRST", 1))]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    command = [nvcc, "-ptx", "-arch=sm_90a", *build.OPTIONS, *defines, f"-I{build.INCLUDE}", "-o", tmp_path / "out.ptx"]
    subprocess.run([*command, ahead.FOLDER / file], check=True)
    kernels = re.split(r"\.visible \.entry ", (tmp_path / "out.ptx").read_text())[1:]
    assert kernels
    for kernel in kernels:
        body = kernel[kernel.index("{") :]  # behind the parameters
        ordered = r"griddepcontrol\.\w+|(?:ld|st|atom|red)\.(?!param)\S+|cp\.async\S*|ldu\S*"
        assert re.search(ordered, body).group() == "griddepcontrol.wait", kernel.split("(")[0]


@needs_nvcc
def test_what_was_compiled_ahead_needs_no_compiler_and_no_cache(tmp_path, monkeypatch):
    source, cubins = tmp_path / "fill.cu", tmp_path / "cubins"
    source.write_text('extern "C" __global__ void fill(float* out) { out[threadIdx.x] = VALUE; }\n')
    path = build.compile_ahead(source, {"VALUE": 1}, cubins)
    assert path.stat().st_mode & 0o444 == 0o444
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "AHEAD", cubins)
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    assert build.cubin(source, {"VALUE": 1}) == path.read_bytes()
    with pytest.raises(build.BuildError):
        build.cubin(source, {"VALUE": 2})
    source.write_text(source.read_text() + "// changed\n")
    with pytest.raises(build.BuildError):
        build.cubin(source, {"VALUE": 1})
    assert not (tmp_path / "cache").exists()


@needs_nvcc
def test_the_command_compiles_what_the_ranks_need(tmp_path, monkeypatch, capsys):
    step_only = {ahead.Unit("step/emit.cu", tuple(hopper.step.emit_defines().items()))}
    monkeypatch.setattr(ahead, "units", lambda shape, rank, tp: step_only)
    ahead.main(["--tp", "2", "--to", str(tmp_path / "cubins")])
    (cubin,) = (tmp_path / "cubins").iterdir()
    assert cubin.read_bytes().startswith(b"\x7fELF")
    assert "1 cubins" in capsys.readouterr().out


def test_without_nvcc_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="nvcc"):
        ahead.main(["--tp", "1", "--to", str(tmp_path)])
