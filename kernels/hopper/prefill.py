"""The operations of a prefill step on Hopper: `kernels.ops.Operations` for packed prompts."""

from kernels.hopper.attention import prefill_attention as attention
from kernels.hopper.experts import prefill_experts as experts
from kernels.hopper.linear.prefill import prefill_linear as linear
from kernels.hopper.linear.prefill import prefill_linear_partial as linear_partial
from kernels.hopper.norm import embed_norm
from kernels.hopper.norm import prefill_add_norm as add_norm
from kernels.hopper.norm import prefill_add_norm_route as add_norm_route

__all__ = ["add_norm", "add_norm_route", "attention", "embed_norm", "experts", "linear", "linear_partial"]
