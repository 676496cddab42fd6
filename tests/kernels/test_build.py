"""Compiling and caching; launching is tested with every kernel on a GPU."""

import shutil
import threading

import pytest

from kernels import build

SOURCE = 'extern "C" __global__ void fill(float* out) { out[threadIdx.x] = VALUE; }\n'
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")), reason="no nvcc on this machine"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "fill.cu"
    path.write_text(SOURCE)
    return path


def cached():
    return sorted(path.name for path in build.cache_folder().iterdir())


@needs_nvcc
def test_a_cubin_is_cached_by_everything_that_went_into_it(source, monkeypatch):
    first = build.cubin(source, {"VALUE": 1})
    assert first.startswith(b"\x7fELF")
    assert len(cached()) == 1
    build.cubin(source, {"VALUE": 2})
    source.write_text(SOURCE + "// changed\n")
    build.cubin(source, {"VALUE": 1})
    assert len(cached()) == 3
    monkeypatch.setattr(build, "_nvcc", lambda *_: pytest.fail("compiled again"))
    source.write_text(SOURCE)
    assert build.cubin(source, {"VALUE": 1}) == first


@needs_nvcc
def test_processes_that_build_at_once_leave_one_whole_file(source):
    threads = [threading.Thread(target=build.cubin, args=(source, {"VALUE": 1})) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cached()) == 1


@needs_nvcc
def test_an_error_in_a_kernel_is_told_in_the_compilers_words(source):
    source.write_text("__global__ void broken() { undefined_name(); }")
    with pytest.raises(build.BuildError, match=r"fill\.cu(.|\n)*undefined_name"):
        build.cubin(source, {})
    assert not build.cache_folder().exists()


def test_without_a_compiler_the_error_says_what_is_missing(source, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    with pytest.raises(build.BuildError, match="neither nvcc nor NVRTC"):
        build.cubin(source, {"VALUE": 1})
