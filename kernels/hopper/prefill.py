"""The products of a prefill step on Hopper, by wgmma: `linear` and `experts` for many tokens, over the same weights.

How they work is written in prefill.cu. A token's bytes depend on itself alone, whatever the prompt was cut into and
whoever shares the step; they are not those of the decode kernels. Knows tensors and launches.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module
from kernels.hopper.experts import PackedExperts, group
from kernels.hopper.linear import PackedLinear, check
from kernels.hopper.peers import Peers

ROWS, TOKENS = 192, 128  # of a block
THREADS = 512
STAGE_BYTES, OUT_BYTES = 6 * TOKENS * 64 * 2, 3 * TOKENS * (64 + 8) * 2  # of tokens, and of outputs
SHARED_BYTES = STAGE_BYTES + OUT_BYTES + 1024  # room to align them
KINDS = {"dense": 0, "up": 1, "down": 2}


def prefill_linear(x: Tensor, weight: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """x [T, K] bf16, bias [N] bf16 -> [T, N] bf16. Raises ValueError where N is not a multiple of 8."""
    tokens = x.shape[0]
    check(x, weight, bias)
    if weight.rows % 8:
        raise ValueError(f"{weight.rows} rows: a multiple of 8 is what leaves in 16-byte pieces")
    out = torch.empty(tokens, weight.rows, dtype=torch.bfloat16, device=x.device)
    _kernel("dense", weight.columns).launch(
        grid=_grid(weight.rows, -(-tokens // TOKENS), x.device),
        block=THREADS,
        args=(weight.tiles, x, bias, out, weight.rows, tokens),
    )
    return out


def prefill_linear_part(x: Tensor, weight: PackedLinear, bias: Tensor | None, peers: Peers) -> Tensor:
    """`prefill_linear` for a result that the ranks add up: `prefill_add_norm_route` sends it."""
    return prefill_linear(x, weight, bias)


def prefill_experts(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PackedExperts, down: PackedExperts, limit: float
) -> Tensor:
    """Each token through its chosen experts, weighted, not summed.

    x [T, H] bf16, expert_ids [T, active] int64, expert_weights [T, active] float32, gate_up interleaved -> [T, active,
    H] bf16. Raises ValueError for shapes that do not fit together.
    """
    count, active = expert_ids.shape
    hidden, inner = gate_up.columns, down.columns
    if x.shape != (count, hidden) or gate_up.rows != 2 * inner or down.rows != hidden or not gate_up.interleaved:
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {gate_up.rows} x {gate_up.columns}, down {down.rows} x {down.columns} for "
            f"{count} tokens do not fit together"
        )
    x, expert_weights = x.contiguous(), expert_weights.contiguous()
    order, tiles = group(expert_ids.contiguous(), gate_up.bias.shape[0], TOKENS)
    h = torch.empty(count * active, inner, dtype=torch.bfloat16, device=x.device)
    y = torch.empty(count, active, hidden, dtype=torch.bfloat16, device=x.device)
    for kind, source, packed, result in (("up", x, gate_up, h), ("down", h, down, y)):
        _kernel(kind, packed.columns).launch(
            grid=_grid(packed.rows, len(tiles), x.device),
            block=THREADS,
            args=(
                packed.values,
                packed.scales,
                packed.bias,
                source,
                result,
                tiles,
                order,
                expert_weights,
                packed.rows,
                active,
                len(tiles),
                limit,
            ),
        )
    return y


def _grid(rows: int, tiles: int, device: torch.device) -> tuple[int, int, int]:
    """A block a multiprocessor, or an item."""
    return min(-(-rows // ROWS) * tiles, torch.cuda.get_device_properties(device).multi_processor_count), 1, 1


@cache
def _kernel(kind: str, columns: int) -> Kernel:
    module = compile_module(Path(__file__).with_name("prefill.cu"), {"KIND": KINDS[kind], "COLUMNS": columns})
    return module.kernel("prefill", shared_bytes=SHARED_BYTES)
