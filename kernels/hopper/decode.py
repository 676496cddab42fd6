"""The operations of a decode step on Hopper: `kernels.ops.Operations` for one token of each request."""

from kernels.hopper.attention import decode_attention as attention
from kernels.hopper.experts import decode_experts as experts
from kernels.hopper.linear import decode_linear as linear
from kernels.hopper.linear import decode_linear_partial as linear_partial
from kernels.hopper.norm import decode_add_norm as add_norm
from kernels.hopper.norm import decode_add_norm_route as add_norm_route
from kernels.hopper.norm import embed_norm

__all__ = ["add_norm", "add_norm_route", "attention", "embed_norm", "experts", "linear", "linear_partial"]
