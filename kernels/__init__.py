"""The choice of kernels, made once at start: a module with one function for each operation of the forward."""

from types import ModuleType

import torch

from conf.schema import ConfigError, Kernels
from kernels import hopper, reference

HOPPER = (9, 0)  # compute capability


def choose(name: Kernels, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Raises ConfigError for kernels that cannot run on the device, or with the dtype."""
    if name is Kernels.reference or (name is Kernels.auto and device.type == "cpu"):
        return reference
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ConfigError(f"kernels.name: {name.name} needs an NVIDIA Hopper GPU, found {found}; allowed: reference")
    if dtype is not torch.bfloat16:
        raise ConfigError(f"kernels.dtype: got {str(dtype).removeprefix('torch.')}, allowed: bfloat16 with hopper")
    return hopper
