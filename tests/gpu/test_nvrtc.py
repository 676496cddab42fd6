"""Every kernel file compiles without nvcc too, with NVRTC, and loads on a Hopper GPU."""

import pytest

from conf.schema import RandomShape
from engine.ahead import FOLDER, units
from engine.architecture import Architecture
from kernels import build

pytestmark = pytest.mark.gpu

UNITS = {unit.file: dict(unit.defines) for unit in sorted(units(Architecture.from_random_shape(RandomShape()), 1, 2))}


def test_no_file_is_missing_here():
    assert {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.cu")} == set(UNITS)


@pytest.mark.parametrize("wait_first", [False, True])
@pytest.mark.parametrize("file", UNITS)
def test_a_file_compiles_with_nvrtc(file, wait_first, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    defines = UNITS[file] | ({"WAIT_FIRST": 1} if wait_first else {})
    build.Module(build.cubin(FOLDER / file, defines))
