"""Dense layers of a prefill step: how prefill.cu is launched, over the weights that `pack` of this package made.

A token's bytes depend on itself alone, whatever the prompt was cut into and whoever shares the step; they are not those
of the decode kernels.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernels.build import load_kernel
from kernels.hopper.linear import check_input
from kernels.ops import PackedLinear, Peers

CONSUMERS = 3  # warpgroups of a block, 64 weight rows each
TOKENS = 128  # of a block
DEPTH = 64  # columns of a stage
STAGES = 6
THREADS = 128 * (CONSUMERS + 1)
# The stages of tokens, each consumer's 64 outputs a token, 8 apart, and room to align the stages.
SHARED_BYTES = STAGES * TOKENS * DEPTH * 2 + CONSUMERS * TOKENS * (64 + 8) * 2 + 1024


def prefill_defines(columns: int) -> dict[str, int]:
    """The macros of prefill.cu."""
    return {
        "COLUMNS": columns,
        "CONSUMERS": CONSUMERS,
        "TOKENS": TOKENS,
        "DEPTH": DEPTH,
        "STAGES": STAGES,
        "SHARED_BYTES": SHARED_BYTES,
    }


def prefill_linear(x: Tensor, weight: PackedLinear) -> Tensor:
    """x [T, K] bf16 -> [T, N] bf16. Raises ValueError for an x that does not fit, and for N not a multiple of 8."""
    tokens = x.shape[0]
    check_input(x, weight)
    if weight.rows % 8:
        raise ValueError(f"{weight.rows} rows: a multiple of 8, which prefill stores in pieces of 16 bytes")
    out = torch.empty(tokens, weight.rows, dtype=torch.bfloat16, device=x.device)
    defines = prefill_defines(weight.columns)
    kernel = load_kernel(Path(__file__).with_name("prefill.cu"), "prefill_linear", defines, SHARED_BYTES)
    items = -(-weight.rows // (64 * CONSUMERS)) * -(-tokens // TOKENS)
    kernel.launch(
        grid=(min(items, torch.cuda.get_device_properties(x.device).multi_processor_count), 1, 1),
        block=THREADS,
        args=(weight.tiles, x, weight.bias, out, weight.rows, tokens),
    )
    return out


def prefill_linear_partial(x: Tensor, weight: PackedLinear, peers: Peers) -> Tensor:
    """`prefill_linear` for a partial sum: `prefill_add_norm_route` sends it to the other ranks."""
    return prefill_linear(x, weight)
