"""Dense layers on Hopper: `kernels.reference.linear` over weights packed once, when they are loaded.

How the kernels work, and the reasons for the layout, are in decode.cu. Knows tensors; which layer they belong to is the
caller's business.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import Kernel, load_kernel
from kernels.hopper.exchange import exchange_arguments, one_shot_rows
from kernels.ops import PackedLinear, Peers

FOLDER = Path(__file__).parent
STRIP_ROWS = 16  # rows of a strip: M of the multiply
STEP_COLUMNS = 32  # columns of a packed tile: two fragments
TILE_BYTES = STRIP_ROWS * STEP_COLUMNS * 2
MOST_PROJECTION_ROWS = 8192  # fewer rows are few strips: more warps on each keep more loads in flight

NARROW_TOKENS = (2, 8)  # that the kernels narrow_2 and narrow_8 take
WIDE_TOKENS = (16, 32, 64)  # and wide_16, ...; above 64 the grid tiles tokens by 64


class Geometry(NamedTuple):
    """How the decode kernels divide a layer; what decode.cu takes as macros, which it explains."""

    columns: int
    splits: int
    narrow_depth: int
    narrow_kept: int
    narrow_blocks: int
    narrow_pitch: int
    most_warps: int
    wide_depth: int

    @property
    def steps(self) -> int:
        """Of 32 columns, in the longest split."""
        return -(-(self.columns // STEP_COLUMNS) // self.splits)

    def defines(self, ranks: int) -> dict[str, int]:
        """The macros of decode.cu."""
        fields = {name.upper(): value for name, value in self._asdict().items()}
        return fields | {"STRIP_ROWS": STRIP_ROWS, "STEP_COLUMNS": STEP_COLUMNS, "RANKS": ranks}


def geometry(rows: int, columns: int) -> Geometry:
    """A function of the weight's shape alone, so that a token's bytes do not depend on how many tokens there are."""
    splits = splits_of(rows)
    # A short split has half of itself in flight with 6 steps, and the registers saved make room for a third block on
    # each multiprocessor: all 320 of QKV are resident.
    short = columns // STEP_COLUMNS // splits <= 12
    narrow_depth = 6 if short else 8
    longest = -(-(columns // STEP_COLUMNS) // splits)
    return Geometry(
        columns=columns,
        splits=splits,
        narrow_depth=narrow_depth,
        # lm_head's blocks are too many to be resident at once, and keep nothing.
        narrow_kept=max(longest - narrow_depth, 0) if splits == 8 else 0,
        narrow_blocks=24 // splits if short else 20 // splits,
        narrow_pitch=-(-columns * 2 // 128) * 128 + 16,  # 16 past a multiple of 128: tokens begin in different banks
        # 20 warps leave 102 registers a lane and take all 320 strips of QKV in one round of 16 clusters; 16 leave 128,
        # and a longer split has use for more loads in flight.
        most_warps=20 if short else 16,
        wide_depth=4 if short else 6,
    )


def splits_of(rows: int) -> int:
    """K splits of a weight of so many rows: warps of a narrow block, blocks of a wide cluster."""
    return 8 if rows <= MOST_PROJECTION_ROWS else 4


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """weight [N, K] bf16 on any device, bias [N] bf16 -> the packed copy on the same device.

    tiles [strips of 16 rows, steps of 32 columns, 2 fragments, 32 lanes, 8] bf16, zero past the last row. Row 8h + g
    and column 16s + 8p + 2t + e of a tile lie in fragment s, lane 4g + t, at 4p + 2h + e: as the PTX ISA lays out the A
    operand of mma.m16n8k16, and a warp's 16 rows of that of wgmma.m64nNk16. Columns are in natural order. Takes no
    scratch memory. Raises ValueError for a weight or a bias that the kernels do not take.
    """
    if weight.dim() != 2 or weight.dtype != torch.bfloat16 or weight.shape[1] % STEP_COLUMNS:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype}: [N, K] bfloat16 with K a multiple of {STEP_COLUMNS} is "
            "what can be packed"
        )
    rows, columns = weight.shape
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != (rows,)):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype}: [{rows}] bfloat16 is what this weight takes")
    whole = rows // STRIP_ROWS  # strips without padding
    shape = -(-rows // STRIP_ROWS), columns // STEP_COLUMNS, 2, 32, 8
    tiles = torch.empty(*shape, dtype=weight.dtype, device=weight.device)
    as_given = tiles.view(*tiles.shape[:3], 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)  # strip h g step s p t e
    columns_apart = weight.view(rows, -1, 2, 2, 4, 2)  # step s p t e
    as_given[:whole] = columns_apart[: whole * STRIP_ROWS].view(whole, 2, 8, *columns_apart.shape[1:])
    for row in range(rows % STRIP_ROWS):
        as_given[whole, row // 8, row % 8] = columns_apart[whole * STRIP_ROWS + row]
    for row in range(rows % STRIP_ROWS or STRIP_ROWS, STRIP_ROWS):
        as_given[whole, row // 8, row % 8] = 0
    return PackedLinear(tiles, bias, rows, columns)


def decode_linear(x: Tensor, weight: PackedLinear) -> Tensor:
    """x [T, K] bf16 -> [T, N] bf16. A token's bytes do not depend on the other tokens nor on T."""
    return launch(kernel_for(x.shape[0]), x, weight)


def decode_linear_partial(x: Tensor, weight: PackedLinear, peers: Peers) -> Tensor:
    """`decode_linear` for a partial sum: the kernel sends it to the other ranks, whose `add_norm_route` adds it up."""
    return launch(kernel_for(x.shape[0]), x, weight, peers)


def kernel_for(tokens: int) -> str:
    """Up to 8 tokens x is small beside a strip of weights and is read for each; above, a cluster keeps it."""
    if tokens <= NARROW_TOKENS[-1]:
        return f"narrow_{next(most for most in NARROW_TOKENS if tokens <= most)}"
    return f"wide_{next((tile for tile in WIDE_TOKENS if tokens <= tile), WIDE_TOKENS[-1])}"


def launch(name: str, x: Tensor, weight: PackedLinear, peers: Peers | None = None) -> Tensor:
    """`decode_linear`, or with peers `decode_linear_partial`, by the kernel of that name: all give the same bytes."""
    tokens, tile = x.shape[0], int(name.split("_")[1])
    check_input(x, weight)
    out = torch.empty(tokens, weight.rows, dtype=torch.bfloat16, device=x.device)
    if not tokens:
        return out
    layer, ranks, strips = geometry(weight.rows, weight.columns), peers.size if peers else 1, weight.tiles.shape[0]
    if name.startswith("narrow"):
        if tokens > tile:
            raise ValueError(f"{name} takes up to {tile} tokens, not {tokens}")
        warps, grid = layer.splits, (strips, 1, 1)
        kernel = _kernel(name, layer, ranks, narrow_shared(name, layer, tokens))
    else:
        largest = _kernel(name, layer, ranks, wide_shared(tile, layer, layer.most_warps))
        resident = largest.resident_clusters(layer.splits, layer.most_warps * 32)
        warps, clusters = wide_grid(strips, layer.most_warps, resident)
        grid = (layer.splits, -(-tokens // tile), clusters)
        kernel = _kernel(name, layer, ranks, wide_shared(tile, layer, warps))
    area: tuple[Tensor | None, int, int] = (None, 0, 0)
    if peers:
        area = exchange_arguments(peers, peers.attention, 2 * weight.rows * one_shot_rows(tokens, ranks))
    kernel.launch(grid=grid, block=warps * 32, args=(weight.tiles, x, weight.bias, out, weight.rows, tokens, *area))
    return out


def check_input(x: Tensor, weight: PackedLinear) -> None:
    """Raises ValueError for an input that does not fit the weight."""
    if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[1:] != (weight.columns,) or x.data_ptr() % 16:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}: a contiguous, 16-byte aligned [T, {weight.columns}] bfloat16 "
            "is what this layer takes"
        )


def wide_grid(strips: int, most: int, resident: int) -> tuple[int, int]:
    """Warps of a block, and clusters: all of them resident at once, in as few rounds over groups of strips as blocks of
    up to `most` warps can make, each round as full as the others."""
    rounds = -(-strips // (resident * most))
    warps = -(-strips // (resident * rounds))
    return warps, min(resident, -(-strips // warps))


def narrow_shared(name: str, layer: Geometry, tokens: int) -> int:
    """Bytes of dynamic shared memory: x, and narrow_2's steps of a projection that registers do not hold."""
    kept = layer.narrow_kept if name == "narrow_2" else 0
    return kept * layer.splits * TILE_BYTES + tokens * layer.narrow_pitch


def wide_shared(tile: int, layer: Geometry, warps: int) -> int:
    """Bytes of dynamic shared memory: the longest split's x, and every split's sums of the units a block adds up."""
    units = -(-warps * (tile // 8) // layer.splits)  # of 16 rows by 8 tokens, each 512 bytes
    return tile * layer.steps * STEP_COLUMNS * 2 + units * layer.splits * 512


def _kernel(name: str, layer: Geometry, ranks: int, shared: int) -> Kernel:
    return load_kernel(FOLDER / "decode.cu", name, layer.defines(ranks), shared)
