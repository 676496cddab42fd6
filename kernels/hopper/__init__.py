"""The H100's operations: the names and meanings of kernels.reference, bfloat16, head dimension 64."""

from kernels.hopper.attention import decode_attention, prefill_attention
from kernels.hopper.experts import experts
from kernels.hopper.experts import pack as pack_experts
from kernels.hopper.linear import linear, linear_part
from kernels.hopper.linear import pack as pack_linear
from kernels.hopper.norm import add_norm, add_norm_route, embed_norm, prefill_add_norm, prefill_add_norm_route
from kernels.hopper.peers import join
from kernels.hopper.prefill import prefill_experts, prefill_linear, prefill_linear_part
from kernels.hopper.sampler import sample
from kernels.hopper.step import advance, emit

__all__ = [
    "add_norm",
    "add_norm_route",
    "advance",
    "decode_attention",
    "embed_norm",
    "emit",
    "experts",
    "join",
    "linear",
    "linear_part",
    "pack_experts",
    "pack_linear",
    "prefill_add_norm",
    "prefill_add_norm_route",
    "prefill_attention",
    "prefill_experts",
    "prefill_linear",
    "prefill_linear_part",
    "sample",
]
