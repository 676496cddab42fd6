"""Compiling and caching; launching is tested with every kernel on a GPU."""

import re
import shutil
import subprocess
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


SERIALIZED = """
#include "common/wgmma.cuh"
extern "C" __global__ void products(float* out, unsigned long long b) {
    float sums[16] = {};
    unsigned a[4] = {threadIdx.x, 1, 2, 3};
    wgmma_fence();
    wgmma(sums, a, b);
    wgmma_commit();
    TOUCH
    wgmma_wait<0>();
    for (int i = 0; i < 16; ++i) out[threadIdx.x * 16 + i] = sums[i];
}
"""


@needs_nvcc
def test_a_kernel_whose_products_ptxas_would_serialize_is_refused(source):
    source.write_text(SERIALIZED.replace("TOUCH", ""))
    build.cubin(source, {})
    source.write_text(SERIALIZED.replace("TOUCH", "sums[3] += 1.0f;"))
    with pytest.raises(build.BuildError, match=r"waits for wgmma(.|\n)*C75"):
        build.cubin(source, {})


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
def test_a_cubin_is_cached_by_the_headers_that_its_source_includes(source):
    (source.parent / "value.cuh").write_text('#include "inner.cuh"\n')
    (source.parent / "inner.cuh").write_text("#define VALUE 1\n")
    source.write_text('#include "common/ptx.cuh"\n#include "value.cuh"\n' + SOURCE)
    first = build.cubin(source, {})
    (source.parent / "inner.cuh").write_text("#define VALUE 2\n")
    assert build.cubin(source, {}) != first
    assert len(cached()) == 2
    assert [path.name for path in build.included_files(source)] == ["fill.cu", "ptx.cuh", "value.cuh", "inner.cuh"]


def test_a_header_that_is_not_there_is_named(source):
    source.write_text('#include "missing.cuh"\n' + SOURCE)
    with pytest.raises(build.BuildError, match=r'fill\.cu includes "missing\.cuh"'):
        build.cubin(source, {})


def test_kernels_loaded_in_wait_first_are_another_build(source, monkeypatch):
    loaded = []

    class Module:
        def __init__(self, cubin):
            loaded.append(cubin)

        def kernel(self, name, shared_bytes):
            return self, name, shared_bytes

    monkeypatch.setattr(build, "Module", Module)
    monkeypatch.setattr(build, "cubin", lambda source, defines: defines)
    monkeypatch.setattr(build.torch.cuda, "current_device", lambda: 0)
    usual = build.load_kernel(source, "fill", {"VALUE": 1}, 16)
    with build.wait_first():
        waiting = build.load_kernel(source, "fill", {"VALUE": 1}, 16)
    assert loaded == [{"VALUE": 1}, {"VALUE": 1, "WAIT_FIRST": 1}]
    assert build.load_kernel(source, "fill", {"VALUE": 1}, 16) == usual != waiting
    assert len(loaded) == 2


@needs_nvcc
@pytest.mark.parametrize("wait_first", [False, True])
def test_in_wait_first_a_kernel_begins_with_its_wait(source, wait_first):
    body = "griddep_wait_first(); out[0] = VALUE; griddep_launch_dependents(); griddep_wait(); out[1] = VALUE;"
    source.write_text(f'#include "common/ptx.cuh"\nextern "C" __global__ void fill(float* out) {{ {body} }}\n')
    nvcc = build._find_nvcc()
    options = ["-ptx", "-arch=sm_90a", f"-I{build.INCLUDE}", "-DVALUE=1", f"-DWAIT_FIRST={int(wait_first)}"]
    command = [nvcc, *options, "-o", "-", str(source)]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    steps = re.findall(r"griddepcontrol\.\w+|st\.global", ptx)
    usual = ["st.global", "griddepcontrol.launch_dependents", "griddepcontrol.wait", "st.global"]
    assert steps == (["griddepcontrol.wait"] if wait_first else []) + usual


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
