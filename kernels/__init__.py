"""The choice of kernels, made once at start. `kernels.ops` says what a set of kernels must offer."""

from typing import Literal

import torch

from kernels import hopper, reference
from kernels.ops import KernelSet, Operations, UnsupportedError

HOPPER = (9, 0)  # compute capability

# For mypy, which does not look into a module that is a member of another: it is told that these keep the contract too.
_NAMESPACES: tuple[Operations, ...] = (hopper.decode, hopper.prefill)


def choose(name: Literal["auto", "hopper", "reference"], device: torch.device, dtype: torch.dtype) -> KernelSet:
    """auto: the reference on a CPU, hopper on a GPU. Raises UnsupportedError for a device or dtype hopper lacks."""
    if name == "reference" or (name == "auto" and device.type == "cpu"):
        return reference
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        actual = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UnsupportedError("name", name, f"reference on {actual}; hopper kernels need an NVIDIA Hopper GPU")
    if dtype is not torch.bfloat16:
        raise UnsupportedError("dtype", str(dtype).removeprefix("torch."), "bfloat16 with hopper kernels")
    return hopper
