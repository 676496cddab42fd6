"""Every kernel file compiles without nvcc too, with NVRTC, and loads on a Hopper GPU."""

from pathlib import Path

import pytest

from conf.limits import BIAS_ENTRIES, MAX_TOP_LOGPROBS
from kernels import build, hopper

pytestmark = pytest.mark.gpu

FILES = {
    "attention": {"GROUP": 8},
    "prefill_attention": {"GROUP": 8},
    "experts": {"HIDDEN": 2880, "INTER": 1440},
    "linear": {"COLUMNS": 2880, "SHARES": 8, "RANKS": 2},
    "norm": {"HIDDEN": 2880, "RANKS": 2},
    "prefill": {"KIND": 1, "COLUMNS": 2880},
    "sampler": {"BF16": 1, "TOP": MAX_TOP_LOGPROBS, "BIAS_ENTRIES": BIAS_ENTRIES, "RANKS": 2},
    "step": {},
}
FOLDER = Path(hopper.__file__).parent


def test_no_file_is_missing_here():
    assert {path.stem for path in FOLDER.glob("*.cu")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_compiles_with_nvrtc(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    build.Module(build.cubin(FOLDER / f"{name}.cu", FILES[name]))
