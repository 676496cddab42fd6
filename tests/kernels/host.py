"""The kernels' headers compiled for the host, so that tests replay the index arithmetic that kernels execute."""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from kernels.build import INCLUDE

# What CUDA knows without a header. PTX in functions that no test calls is never assembled.
CUDA = """
#include <cstring>
#define __device__
#define __forceinline__ inline
struct uint4 { unsigned x, y, z, w; };
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline size_t __cvta_generic_to_shared(const void*) { return 0; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}
"""


def compile_for_host(code: str, defines: Mapping[str, int], folder: Path) -> ctypes.CDLL:
    """A library of C++ `code`, which includes headers as kernels do and exports functions by `extern "C"`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler on this machine")
    source, library = folder / "host.cpp", folder / "host.so"
    source.write_text(f"#include <cstddef>\n{CUDA}\n{code}")
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{INCLUDE}", *macros, "-o", library, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr
    return ctypes.CDLL(str(library))
