"""The cubins of both models for one and two ranks, and what they take of a multiprocessor.

    python -m tests.kernels.cubins    # writes tests/kernels/resources.json: after a change that is meant

The numbers are those of one compiler, whose version stands beside them.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conf.schema import RandomShape
from engine.ahead import FOLDER, Unit, units
from engine.architecture import Architecture
from kernels import build

RESOURCES = Path(__file__).with_name("resources.json")


@dataclass(frozen=True)
class Table:
    """compiler: nvcc's version. resources: by unit and kernel."""

    compiler: str
    resources: dict[str, dict[str, dict[str, int]]]


def all_units() -> dict[str, Unit]:
    """By name: the file, and the macros in which its units differ."""
    shape = Architecture.from_random_shape(RandomShape())
    unique = sorted(set().union(*(units(shape, rank, tp) for tp in (1, 2) for rank in range(tp))))
    values = defaultdict(set)
    for unit in unique:
        for macro, value in unit.defines:
            values[unit.file, macro].add(value)

    def name_of(unit: Unit) -> str:
        differing = [f"{macro}={value}" for macro, value in unit.defines if len(values[unit.file, macro]) > 1]
        return " ".join([unit.file, *differing])

    return {name_of(unit): unit for unit in unique}


def compile_units(names: dict[str, Unit], folder: Path) -> dict[str, Path]:
    """Compile over all cores, or take what the cache holds -> files in `folder`, by name. Raises BuildError."""

    def compile_unit(name: str, unit: Unit) -> Path:
        path = folder / f"{re.sub(r'[^A-Za-z0-9=]+', '-', name)}.cubin"
        path.write_bytes(build.cubin(FOLDER / unit.file, dict(unit.defines)))
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(compile_unit, *zip(*names.items(), strict=True)), strict=True))


def disassemble(cubin: Path) -> str:
    """nvdisasm's listing of the code."""
    return _run("nvdisasm", "-c", str(cubin))


def resources_of(cubin: Path, listing: str) -> dict[str, dict[str, int]]:
    """By kernel: registers, bytes of stack, bytes of static shared memory with the kilobyte that the system takes, and
    loads and stores of local memory, most of which are spills."""
    usage = _run("cuobjdump", "-res-usage", str(cubin))
    kernels = {}
    for kernel, registers, stack, shared in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        code = re.split(r"^//-+ ", listing.split(f".text.{kernel}:")[1], maxsplit=1, flags=re.MULTILINE)[0]
        kernels[kernel] = {
            "registers": int(registers),
            "stack": int(stack),
            "shared": int(shared),
            "local loads": len(re.findall(r"\bLDL\b", code)),
            "local stores": len(re.findall(r"\bSTL\b", code)),
        }
    return kernels


def nvcc_version() -> str:
    """As `nvcc --version` says it, or "" where there is none."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        return ""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V([\d.]+)", text)
    return version[1] if version else ""


def read_table() -> Table:
    return Table(**json.loads(RESOURCES.read_text()))


def write_table() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = compile_units(all_units(), Path(folder))
        resources = {name: resources_of(path, disassemble(path)) for name, path in paths.items()}
    table = {"compiler": nvcc_version(), "resources": resources}
    text = json.dumps(table, indent=1, sort_keys=True)
    text = re.sub(r"\{[^{}]*\}", lambda kernel: " ".join(kernel[0].split()), text)  # a kernel a line
    RESOURCES.write_text(text + "\n")


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def _tool(name: str) -> str:
    """nvdisasm or cuobjdump, from the packages of that name in the test extra."""
    places = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    path = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if not path:
        raise FileNotFoundError(f"{name} is not installed; the package nvidia-cuda-{name} brings it")
    return path


if __name__ == "__main__":
    write_table()
    print(f"wrote {RESOURCES}")
