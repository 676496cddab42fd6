"""The H100's kernels, `kernels.ops.KernelSet`: bfloat16, head dimension 64.

A folder an operation, with the CUDA sources and the module that launches them; `common` is what they share. The order
of the kernels of a step, and what each may read when, is in kernels/README.md.
"""

from kernels.hopper import decode, prefill
from kernels.hopper.experts import pack as pack_experts
from kernels.hopper.linear import pack as pack_linear
from kernels.hopper.peers import join
from kernels.hopper.sampler import sample
from kernels.hopper.scorer import score
from kernels.hopper.step import advance, emit, install

name = "hopper"

__all__ = [
    "advance",
    "decode",
    "emit",
    "install",
    "join",
    "name",
    "pack_experts",
    "pack_linear",
    "prefill",
    "sample",
    "score",
]
