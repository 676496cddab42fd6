"""Metadata for `pip install -e .`; everything else stands in pyproject.toml.

The checkout is the distribution: serve.py, the kernels' sources and the configuration are used from it. A wheel would
hold packages named `serve`, `kernels` and `conf`, which other projects on PyPI are called as well, and no serve.py.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class NoWheel(bdist_wheel):
    """Refuses to build a wheel; an editable install makes its own."""

    def run(self) -> None:
        raise SystemExit(
            "mini-vllm is not installed as a wheel: it runs from its checkout. Use `make install`, or "
            "`pip install -e .` in the checkout."
        )


setup(cmdclass={"bdist_wheel": NoWheel})
