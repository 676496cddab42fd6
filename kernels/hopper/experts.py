"""The MXFP4 mixture of experts on Hopper: packing the weights once, and launching experts.cu.

`experts` means what `kernels.reference.experts` means, but for the sum over choices, and `group` sorts by expert. Knows
shapes and launches; the layout of the packed words is explained in experts.cu, which reads them.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module

WARPS = 8
THREADS = 32 * WARPS
LARGE_TOKENS = 64  # pairs of one expert in a block of the large kernels
FEW_TOKENS, FEW_PAIRS = 8, 32  # that the kernels experts_*_8 take
SMALL_TOKENS, SMALL_PAIRS = 64, 256  # that the kernels experts_*_24 take
MOST_SHARED = 223 * 1024  # bytes that a block of the small kernels asks for at most; 4 KB are left for its own
MAX_EXPERTS = 1024
FEW_BLOCKS = 3  # a multiprocessor, of experts_*_8
TEAMS, TOKEN_TILES = 2, 3  # of experts_*_24: teams of 8 warps, and tiles of 8 tokens of an expert at once
SUMS_BYTES = 2 * TEAMS * THREADS * TOKEN_TILES * 16  # two turns' partial sums
MAX_COLUMNS = 4096  # a warp holds an eighth of a strip's columns in registers
SCALE_OFFSET = 94  # 126 for the position of the value's bits, less 32 that the epilogue multiplies back
MAX_SCALE = 254 - SCALE_OFFSET
COLUMN_BLOCK, TILE_COLUMNS, STRIP_ROWS = 32, 64, 16


class PackedExperts(NamedTuple):
    """One projection of every expert, in the order of experts.cu: lane (g, t) = (lane // 4, lane % 4)."""

    values: Tensor  # [E, strips, tiles, 32 lanes, 4 words] int32, 8 values a word
    scales: Tensor  # [E, strips, tiles, 8 g, 2 blocks, 2 row halves] uint8, the bf16 exponent of the multiplier
    bias: Tensor  # [E, rows] bf16, in the order of the checkpoint
    rows: int
    columns: int
    interleaved: bool


def pack(blocks: Tensor, scales: Tensor, bias: Tensor, interleaved: bool) -> PackedExperts:
    """MXFP4 as in a checkpoint -> the order in which a warp reads it, on the same device.

    blocks [E, N, K/32, 16] uint8, scales [E, N, K/32] uint8, bias [E, N] bf16; interleaved: even rows are gates, odd
    rows ups, and a pair is to land in one lane. Takes one expert's memory besides the result. Every value is kept
    exactly for scale bytes 27..160; below, in effect, it rounds to a multiple of 2^-101. Raises ValueError for a scale
    above 2^33 or NaN (no checkpoint of sense has one), and for shapes the kernels do not take.
    """
    count, rows, column_blocks, _ = blocks.shape
    columns = column_blocks * COLUMN_BLOCK
    if rows % STRIP_ROWS or not COLUMN_BLOCK <= columns <= MAX_COLUMNS or count > MAX_EXPERTS:
        raise ValueError(
            f"{count} experts of {rows} x {columns}: rows must be a multiple of {STRIP_ROWS}, columns "
            f"{COLUMN_BLOCK}..{MAX_COLUMNS}, experts at most {MAX_EXPERTS}"
        )
    if int(scales.max()) > MAX_SCALE:
        raise ValueError(f"MXFP4 scale byte {int(scales.max())}: at most {MAX_SCALE} (2^{MAX_SCALE - 127}) is taken")
    strips, tiles = rows // STRIP_ROWS, -(-columns // TILE_COLUMNS)
    lookups = _word_parts(blocks.device)
    values = torch.empty(count, strips, tiles, 32, 4, dtype=torch.int32, device=blocks.device)
    packed_scales = torch.empty(count, strips, tiles, 8, 2, 2, dtype=torch.uint8, device=blocks.device)
    spare = tiles * 2 - column_blocks  # half a tile of zeros, with any scale
    split_rows = (strips, 8, 2) if interleaved else (strips, 2, 8)
    for expert in range(count):
        pairs = torch.nn.functional.pad(blocks[expert], (0, 0, 0, spare))  # [N, 2 tiles, 16]: bytes of two columns
        pairs = pairs.view(*split_rows, tiles, 4, 2, 4)  # rows, tile, step, which pair of the step, t
        by_row = pairs.transpose(1, 2) if interleaved else pairs  # [strips, half, g, tiles, step, which, t]
        words = values[expert].view(strips, tiles, 8, 4, 4).permute(0, 2, 1, 4, 3)  # [strips, g, tiles, step, t]
        words.zero_()
        for which in range(2):
            for half in range(2):
                part = by_row[:, half, ..., which, :]
                found = lookups[2 * which + half].index_select(0, part.flatten().int())
                words |= found.view(part.shape)
        exponents = torch.nn.functional.pad(scales[expert], (0, spare)) + SCALE_OFFSET
        exponents = exponents.view(*split_rows, tiles, 2)
        by_row = exponents if interleaved else exponents.transpose(1, 2)  # [strips, g, half, tiles, block]
        packed_scales[expert] = by_row.permute(0, 3, 1, 4, 2)
    return PackedExperts(values, packed_scales, bias.contiguous(), rows, columns, interleaved)


def _word_parts(device: torch.device) -> list[Tensor]:
    """For each of the four places in a word, what a byte of two columns adds to it: [256] int32.

    The low half of the word holds even columns, the high half odd ones.
    """
    byte = torch.arange(256, dtype=torch.int64, device=device)

    def halves(sign_bit: int, rest_bit: int) -> Tensor:
        def place(code: Tensor) -> Tensor:
            return (code >> 3) << sign_bit | (code & 7) << rest_bit

        word = place(byte & 15) | place(byte >> 4) << 16
        return torch.where(word < 2**31, word, word - 2**32).int()

    return [halves(15, 6), halves(12, 3), halves(13, 0), halves(14, 9)]


def experts(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PackedExperts, down: PackedExperts, limit: float
) -> Tensor:
    """Each token through its chosen experts, weighted; who takes the result sums it over the choices, in their order.

    x [T, H] bf16, expert_ids [T, active] int64, each token's unlike each other, expert_weights [T, active] float32,
    gate_up interleaved -> [T, active, H] bf16. A token's bytes depend on its own row, ids and weights only.
    """
    count, active = expert_ids.shape
    pairs, total = count * active, gate_up.bias.shape[0]
    hidden, inner = gate_up.columns, down.columns
    if x.shape != (count, hidden) or gate_up.rows != 2 * inner or down.rows != hidden or not gate_up.interleaved:
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {gate_up.rows} x {gate_up.columns}, down {down.rows} x {down.columns} for "
            f"{count} tokens do not fit together"
        )
    x, expert_ids, expert_weights = x.contiguous(), expert_ids.contiguous(), expert_weights.contiguous()
    h = torch.empty(pairs, inner, dtype=torch.bfloat16, device=x.device)
    y = torch.empty(count, active, hidden, dtype=torch.bfloat16, device=x.device)
    steps = (("up", x, gate_up, h), ("down", h, down, y))

    if count <= FEW_TOKENS and pairs <= FEW_PAIRS:
        for name, source, packed, result in steps:
            _kernel(f"experts_{name}_8", hidden, inner, count * _pitch(packed.columns)).launch(
                grid=_small_grid(packed, FEW_BLOCKS, 1, min(pairs, total)),
                block=THREADS,
                args=(
                    source,
                    result,
                    packed.values,
                    packed.scales,
                    packed.bias,
                    expert_ids,
                    expert_weights,
                    pairs,
                    active,
                    limit,
                ),
            )
    elif count <= SMALL_TOKENS and pairs <= SMALL_PAIRS:
        for name, source, packed, result in steps:
            capacity = min(8 * TOKEN_TILES, (MOST_SHARED - SUMS_BYTES) // _pitch(packed.columns))
            shared = capacity * _pitch(packed.columns) + SUMS_BYTES
            _kernel(f"experts_{name}_24", hidden, inner, shared).launch(
                grid=_small_grid(packed, 1, TEAMS, min(pairs, total)),
                block=TEAMS * THREADS,
                args=(
                    source,
                    result,
                    packed.values,
                    packed.scales,
                    packed.bias,
                    expert_ids,
                    expert_weights,
                    pairs,
                    active,
                    capacity,
                    limit,
                ),
            )
    else:
        order, tiles = group(expert_ids, total, LARGE_TOKENS)
        for name, source, packed, result in steps:
            strips = packed.rows // STRIP_ROWS
            _kernel(f"experts_{name}_64", hidden, inner, _large_shared_bytes(packed.columns)).launch(
                grid=(-(-strips // WARPS), len(tiles), 1),
                block=THREADS,
                args=(
                    source,
                    result,
                    packed.values,
                    packed.scales,
                    packed.bias,
                    tiles,
                    order,
                    expert_weights,
                    active,
                    limit,
                ),
            )
    return y


def group(expert_ids: Tensor, experts: int, tile_pairs: int) -> tuple[Tensor, Tensor]:
    """Sort (token, choice) pairs by expert, and cut them in tiles of one expert and at most tile_pairs.

    expert_ids [T, active] int64 -> order [pairs] int32, each expert's pairs ascending; tiles [max_tiles, 4] int32, of
    (expert, first place in order, pairs, 0), as many as there could be: those nobody needs come last, with 0 pairs.
    """
    expert_ids = expert_ids.contiguous()
    pairs = expert_ids.numel()
    max_tiles = min(pairs, pairs // tile_pairs + experts)  # every expert may leave one tile partly empty
    order = torch.empty(pairs, dtype=torch.int32, device=expert_ids.device)
    tiles = torch.empty(max_tiles, 4, dtype=torch.int32, device=expert_ids.device)
    _group_kernel().launch(
        grid=(experts, 1, 1), block=1024, args=(expert_ids, order, tiles, pairs, experts, max_tiles, tile_pairs)
    )
    return order, tiles


@functools.cache
def _kernel(name: str, hidden: int, inner: int, shared_bytes: int) -> Kernel:
    module = compile_module(Path(__file__).with_name("experts.cu"), {"HIDDEN": hidden, "INTER": inner})
    return module.kernel(name, shared_bytes=shared_bytes)


@functools.cache
def _group_kernel() -> Kernel:
    return compile_module(Path(__file__).with_name("experts.cu")).kernel("experts_group")


@functools.cache
def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def split_of(columns: int) -> tuple[int, int]:
    """Parts that K is cut into, and tiles in the longest: shares_of and DEPTH of experts.cu."""
    tiles, shares = -(-columns // TILE_COLUMNS), 1
    while shares < WARPS and -(-tiles // shares) > 6:
        shares *= 2
    return shares, -(-tiles // shares)


def _pitch(columns: int) -> int:
    return -(-columns // TILE_COLUMNS) * 128 + 16


def _large_shared_bytes(columns: int) -> int:
    return 2 * LARGE_TOKENS * (split_of(columns)[1] * 128 + 16)


def _small_grid(packed: PackedExperts, resident: int, teams: int, distinct: int) -> tuple[int, int, int]:
    """Blocks that share the strips of all chosen experts, each at least a turn of its teams. Changes no result."""
    shares, _ = split_of(packed.columns)
    groups = -(-(packed.rows // STRIP_ROWS) // (WARPS // shares))
    return min(_multiprocessors() * resident, -(-groups * distinct // teams)), 1, 1
