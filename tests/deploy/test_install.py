"""How the project is installed: from its checkout, in place. A wheel, which could not serve, is refused."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """What a build reads of a checkout."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(checkout, kind):
    code = f"from setuptools import build_meta; build_meta.build_{kind}('built')"
    return subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)


def test_an_editable_install_puts_the_checkout_on_the_path(checkout):
    done = build(checkout, "editable")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".pth")]
    assert path.strip() == str(checkout)


def test_a_wheel_is_refused_with_what_to_do_instead(checkout):
    done = build(checkout, "wheel")
    assert done.returncode != 0
    assert "mini-vllm is not installed as a wheel" in done.stderr
    assert "pip install -e ." in done.stderr
    assert not list(checkout.glob("**/*.whl"))
