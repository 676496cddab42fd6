"""The H100's operations: the names and meanings of kernels.reference, bfloat16, head dimension 64."""

from kernels.hopper.attention import attention, rope_append
from kernels.hopper.experts import experts
from kernels.hopper.experts import pack as pack_experts
from kernels.hopper.linear import linear
from kernels.hopper.linear import pack as pack_linear
from kernels.hopper.norm import add_rms_norm, embed, rms_norm, route
from kernels.hopper.sampler import sample

__all__ = [
    "add_rms_norm", "attention", "embed", "experts", "linear", "pack_experts", "pack_linear", "rms_norm", "rope_append",
    "route", "sample",
]
