"""CUDA C++ to cubins for sm_90a, cached by content; and how they are launched.

Compiles with nvcc where there is one, with NVRTC where there is not, and not at all what was compiled ahead of time
(`python -m engine.ahead`). A cubin is named by a hash of everything that went into it, headers included, and published
by a rename, so that ranks and servers may build at once. Launches go straight to the driver on torch's current stream:
kernels are launched only while a graph is captured, so this path need not be fast.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURE = "90a"  # Hopper, with wgmma and setmaxnreg
OPTIONS = ("-std=c++17", "-O3")
SERIALIZED = re.compile(r"\(C75\d\d\)")  # what ptxas says where it makes products wait on its own
INCLUDE = Path(__file__).with_name("hopper")  # where `#include "common/..."` is looked up
AHEAD = Path(__file__).with_name("cubins")  # what was compiled ahead of time; an image has it, a checkout does not
# Bytes of shared memory that a block may have: of any kernel, and of one whose attribute was set.
DEFAULT_SHARED, MOST_SHARED = 48 * 1024, 227 * 1024


class TensorMap(NamedTuple):
    """A matrix from which a kernel copies boxes to shared memory (`cp.async.bulk.tensor`); its TensorMap.

    matrix: contiguous [rows, columns]. box: rows and columns of a box; what lies outside of the matrix is zero. Of bf16
    a box has 64 columns, swizzled as `stage_operand` in common/wgmma.cuh reads them; of int64 rows follow each other.
    """

    matrix: torch.Tensor
    box: tuple[int, int]


Argument = torch.Tensor | TensorMap | int | float | None

_WAIT_FIRST: ContextVar[bool] = ContextVar("wait_first", default=False)


class BuildError(RuntimeError):
    """A kernel that does not compile, or no compiler; the message holds the compiler's words."""


class Kernel:
    """One `extern "C" __global__` function."""

    def __init__(self, function: Any, shared_bytes: int) -> None:
        self._function = function
        self._shared_bytes = shared_bytes

    def launch(self, grid: tuple[int, int, int], block: int, args: tuple[Argument, ...]) -> None:
        """On torch's current stream. Tensors and None are passed as pointers, int as int32, float as float32, TensorMap
        as the driver encodes it.

        With programmatic dependent launch: the kernel may start before its predecessor has ended, and must execute
        `griddepcontrol.wait` before it touches what others write or read. kernels/README.md has the rules.
        """
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        overlap = driver.CUlaunchAttribute()
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [overlap], 1
        values, types = zip(*map(_argument, args), strict=True)
        _check(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))

    def resident_clusters(self, blocks: int, threads: int) -> int:
        """Clusters of so many blocks of so many threads that the device holds at once.

        A cluster stays within a GPC, and not all of those have the same number of multiprocessors.
        """
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        clusters = int(_check(driver.cuOccupancyMaxActiveClusters(self._function, config)))
        if clusters < 1:
            raise RuntimeError(f"no cluster of {blocks} blocks of {threads} threads fits this device")
        return clusters


class Module:
    """A compiled file."""

    def __init__(self, cubin: bytes) -> None:
        from cuda.bindings import driver

        torch.cuda.current_stream()  # the device's context is made by torch
        self._module = _check(driver.cuModuleLoadData(cubin))

    def kernel(self, name: str, shared_bytes: int = 0) -> Kernel:
        """`shared_bytes` of dynamic shared memory for every launch."""
        from cuda.bindings import driver

        function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
        attributes = driver.CUfunction_attribute
        declared = _check(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))
        if declared + shared_bytes > DEFAULT_SHARED:  # the most at once: the function may have other launches
            most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(function, most, MOST_SHARED - declared))
        # A multiprocessor changes its division into L1 and shared memory only when idle: one division for all kernels,
        # or none could start beside another.
        _check(driver.cuFuncSetAttribute(function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
        return Kernel(function, shared_bytes)


@contextmanager
def wait_first() -> Iterator[None]:
    """Kernels loaded within are compiled so that each executes `griddepcontrol.wait` as its first instruction.

    Such a chain of kernels runs one after the other, which is right whatever the kernels read before their own waits:
    tests compare its bytes with those of the usual build.
    """
    token = _WAIT_FIRST.set(True)
    try:
        yield
    finally:
        _WAIT_FIRST.reset(token)


def load_kernel(source: Path, name: str, defines: Mapping[str, int] | None = None, shared_bytes: int = 0) -> Kernel:
    """A kernel of a .cu file for the current device, with so many bytes of dynamic shared memory in every launch.

    Compiled and loaded once per process, device, set of defines and build mode (`wait_first`). Raises BuildError.
    """
    return _kernel(compile_module(source, defines), name, shared_bytes)


def compile_module(source: Path, defines: Mapping[str, int] | None = None) -> Module:
    """The module of a .cu file for the current device, as `load_kernel` says."""
    macros = dict(defines or {}) | ({"WAIT_FIRST": 1} if _WAIT_FIRST.get() else {})
    return _module(source, tuple(sorted(macros.items())), torch.cuda.current_device())


@functools.cache
def _module(source: Path, defines: tuple[tuple[str, int], ...], device: int) -> Module:
    return Module(cubin(source, dict(defines)))


@functools.cache
def _kernel(module: Module, name: str, shared_bytes: int) -> Kernel:
    return module.kernel(name, shared_bytes)


def cubin(source: Path, defines: Mapping[str, int]) -> bytes:
    """What was compiled ahead, or is in the cache, or is compiled now. Raises BuildError."""
    ahead = AHEAD / _name(source, defines)  # by any compiler: a machine that has them needs none
    if ahead.exists():
        return ahead.read_bytes()
    nvcc = _find_nvcc()
    cached = cache_folder() / _name(source, defines, _version(nvcc) if nvcc else "nvrtc")
    if not cached.exists():
        options = _options(defines)
        _publish(_nvcc(nvcc, source, options) if nvcc else _nvrtc(source, options), cached)
    return cached.read_bytes()


def compile_ahead(source: Path, defines: Mapping[str, int], folder: Path) -> Path:
    """Compile with nvcc into `folder`, under the name by which `cubin` looks in AHEAD. Raises BuildError."""
    nvcc = _find_nvcc()
    if not nvcc:
        raise BuildError("kernels are compiled ahead of time with nvcc, and there is no nvcc here")
    path = folder / _name(source, defines)
    _publish(_nvcc(nvcc, source, _options(defines)), path)
    return path


def included_files(source: Path) -> list[Path]:
    """A file and all that it includes by `#include "..."`, each once, in the order in which they are first included.

    Raises BuildError for a header that lies neither beside its includer nor in INCLUDE.
    """
    files: list[Path] = []

    def visit(path: Path) -> None:
        if path in files:
            return
        files.append(path)
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            candidates = [path.parent / header, INCLUDE / header]
            included = next((candidate.resolve() for candidate in candidates if candidate.exists()), None)
            if included is None:
                raise BuildError(f'{path.name} includes "{header}", which is neither beside it nor in {INCLUDE}')
            visit(included)

    visit(source.resolve())
    return files


def _find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _options(defines: Mapping[str, int]) -> list[str]:
    return [*OPTIONS, *(f"-D{name}={value}" for name, value in sorted(defines.items()))]


def _name(source: Path, defines: Mapping[str, int], *compiler: str) -> str:
    contents = [path.read_text() for path in included_files(source)]
    key = "\0".join([*contents, *_options(defines), ARCHITECTURE, *compiler])
    return f"{source.parent.name}-{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"


def _publish(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)  # another user than the image's builder reads them
    os.replace(file.name, path)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-vllm" / "kernels"


@functools.cache
def _version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _nvcc(nvcc: str, source: Path, options: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.cubin")
        target = f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"
        command = [nvcc, "-cubin", target, *options, f"-I{INCLUDE}", "-o", str(out), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{source.parent.name}/{source.name} does not compile:\n{result.stderr}")
        if SERIALIZED.search(result.stderr):
            file = f"{source.parent.name}/{source.name}"
            raise BuildError(f"{file} compiles, but waits for wgmma where its source does not:\n{result.stderr}")
        return out.read_bytes()


def _nvrtc(source: Path, options: list[str]) -> bytes:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise BuildError(
            f"{source.parent.name}/{source.name}: neither nvcc nor NVRTC (cuda-core) is installed"
        ) from error
    defines = [tuple(option[2:].split("=")) for option in options if option.startswith("-D")]
    settings = ProgramOptions(
        arch=f"sm_{ARCHITECTURE}",
        std="c++17",
        define_macro=defines or None,
        include_path=[str(source.parent), str(INCLUDE)],
        name=source.name,
        device_as_default_execution_space=True,  # NVRTC takes no host functions; nvcc takes constexpr ones as both
    )
    try:
        return bytes(Program(source.read_text(), "c++", settings).compile("cubin").code)
    except Exception as error:  # cuda-core raises several kinds; all of them carry the compiler's log
        raise BuildError(f"{source.parent.name}/{source.name} does not compile:\n{error}") from error


def _argument(value: Argument) -> tuple[Any, Any]:
    if value is None:
        return 0, ctypes.c_void_p
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), ctypes.c_void_p
    if isinstance(value, TensorMap):
        return _encode(value), None
    return value, ctypes.c_int if isinstance(value, int) else ctypes.c_float


def _encode(value: TensorMap) -> Any:
    from cuda.bindings import driver

    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    kind, swizzle = {
        torch.bfloat16: (types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, swizzles.CU_TENSOR_MAP_SWIZZLE_128B),
        torch.int64: (types.CU_TENSOR_MAP_DATA_TYPE_INT64, swizzles.CU_TENSOR_MAP_SWIZZLE_NONE),
    }[value.matrix.dtype]
    (rows, columns), (box_rows, box_columns) = value.matrix.shape, value.box
    return _check(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            value.matrix.data_ptr(),
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(columns * value.matrix.itemsize)],  # bytes from row to row
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {driver.cuGetErrorString(status)[1].decode()}")
    return values[0] if values else None
