"""Imports point one way: each package imports itself and what stands before it, and the HTTP process no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("conf", "kernels", "graphs", "engine", "serve", "demo", "sweep", "tests")

# What the files of a folder may import of ours. Of two folders that hold a file the deeper one counts.
ALLOWED = {
    "conf": ("conf",),
    "kernels": ("kernels",),
    "graphs": ("graphs", "conf", "kernels"),
    "engine": ("engine", "conf", "kernels", "graphs"),
    "serve": ("serve", "conf", "graphs.plan", "graphs.buckets", "engine"),
    "demo": ("demo.bundle", "conf"),
    "demo/training": ("demo", "conf", "kernels", "engine", "serve"),
    "sweep": ("sweep", "conf", "kernels", "graphs", "engine", "serve", "demo.bundle", "demo.checkpoint"),
    "serve.py": ("conf", "engine", "serve"),
    "sweep.py": ("sweep",),
}
# Of a single file, with the reason.
EXCEPTIONS = {
    "engine/llm.py": ("demo.bundle",),  # a composition root like serve.py: turns `weights: demo` into a folder
    "engine/rank.py": ("demo.bundle",),  # so is a rank's process: serve.py's has no torch, which writes the folder
    "demo/checkpoint.py": ("engine",),  # writes what the engine reads, for tests: its names and shapes
}


def imported(file: Path) -> set[str]:
    """What a file imports of ours, at its head or inside functions: `package.module.name`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] in OURS}


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


FILES = {
    str(file.relative_to(ROOT)): modules
    for place, modules in ALLOWED.items()  # what comes later replaces what came before: the deeper folder
    for file in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))
}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    allowed = (*FILES[file], *EXCEPTIONS.get(file, ()))
    assert [name for name in sorted(imported(ROOT / file)) if not within(name, allowed)] == []


@pytest.mark.parametrize("file", EXCEPTIONS)
def test_an_exception_that_is_no_longer_needed_goes(file):
    for module in EXCEPTIONS[file]:
        assert any(within(name, (module,)) for name in imported(ROOT / file)), module


@pytest.mark.parametrize("module", ["serve.app", "engine.messages", "engine.tokenizer", "graphs.plan"])
def test_the_http_process_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_serve_itself_imports_no_torch():
    code = "import importlib.util as u, sys; s = u.spec_from_file_location('start', 'serve.py')"
    code += "; s.loader.exec_module(u.module_from_spec(s)); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
