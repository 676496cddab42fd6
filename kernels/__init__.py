"""The choice of kernels, made once at start: a module with one function for each operation of the forward."""

from types import ModuleType

from conf.schema import Kernels
from kernels import reference


def choose(name: Kernels) -> ModuleType:
    return {Kernels.reference: reference}[name]
