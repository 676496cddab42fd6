"""Dense layers on Hopper: `kernels.reference.linear` over weights packed once, when they are loaded.

How the kernels work, and the reasons for the layout, are in decode.cu, and in tiled.cu, which takes many tokens. Knows
tensors; which layer they belong to is the caller's business.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import MOST_SHARED, Kernel, TensorMap, load_kernel
from kernels.hopper.exchange import exchange_arguments, one_shot_rows
from kernels.ops import PackedLinear, Peers

FOLDER = Path(__file__).parent
STRIP_ROWS = 16  # rows of a strip: M of the multiply
STEP_COLUMNS = 32  # columns of a packed tile: two fragments
TILE_BYTES = STRIP_ROWS * STEP_COLUMNS * 2
MOST_PROJECTION_ROWS = 8192  # fewer rows are few strips: more warps on each keep more loads in flight

NARROW_TOKENS = (2, 8)  # that the kernels narrow_2 and narrow_8 take
WIDE_TOKENS = (16, 32, 64)  # and wide_16, ...; above 64 the grid tiles tokens by 64
TILED_TOKENS = (32, 64, 96, 128)  # of a block of the kernel tiled; a cluster takes one or two such tiles
MOST_TILED_TOKENS = 2 * TILED_TOKENS[-1]
# Of more rows than these, a weight is faster in the kernel tiled from so many tokens on: as measured, kernels/NOTES.md.
TILED_FROM = ((8192, 9), (4096, 33), (2047, 65), (0, 129))
MULTIPROCESSORS = 132  # of an H100 SXM, for which tiles are chosen

# Of the kernel tiled: from a token's 16 rows to the next, staged for storing; bytes of static shared memory, at most;
# and registers of the threads that multiply and of those that copy, by the number of warpgroups that multiply.
TILED_OUT_PITCH = 24
TILED_STATIC_BYTES = 512
TILED_REGISTERS = {1: (200, 56), 2: (232, 40), 3: (160, 32)}


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
        return fields | self.layout_defines() | {"RANKS": ranks}

    def layout_defines(self) -> dict[str, int]:
        """The macros of layout.cuh."""
        return {
            "COLUMNS": self.columns,
            "SPLITS": self.splits,
            "NARROW_PITCH": self.narrow_pitch,
            "STRIP_ROWS": STRIP_ROWS,
            "STEP_COLUMNS": STEP_COLUMNS,
        }


class Tile(NamedTuple):
    """How the kernel tiled divides a layer; what tiled.cu takes as macros, which it explains."""

    consumers: int
    tile_tokens: int
    cluster_rows: int
    cluster_tokens: int

    @property
    def blocks(self) -> int:
        """Of a cluster."""
        return self.cluster_rows * self.cluster_tokens

    @property
    def threads(self) -> int:
        """Of a block: its consumers and a warpgroup of producers."""
        return 128 * (self.consumers + 1)

    @property
    def stage_bytes(self) -> int:
        """Of 64 columns of a block's tokens and of its strips."""
        return 2 * (self.tile_tokens * STEP_COLUMNS * 2 + 4 * self.consumers * TILE_BYTES)

    @property
    def staged_bytes(self) -> int:
        """What a block needs beside its stages: each warp's outputs of 32 tokens, and room to align the stages."""
        return 4 * self.consumers * 32 * TILED_OUT_PITCH * 2 + 1024

    @property
    def stages(self) -> int:
        """As many as there is room for."""
        return (MOST_SHARED - TILED_STATIC_BYTES - self.staged_bytes) // self.stage_bytes

    @property
    def shared_bytes(self) -> int:
        """Of dynamic shared memory."""
        return self.stages * self.stage_bytes + self.staged_bytes

    def defines(self, layer: Geometry, ranks: int) -> dict[str, int]:
        """The macros of tiled.cu."""
        fields = {name.upper(): value for name, value in self._asdict().items()}
        consumer_registers, producer_registers = TILED_REGISTERS[self.consumers]
        return (
            layer.layout_defines()
            | fields
            | {
                "RANKS": ranks,
                "STAGES": self.stages,
                "OUT_PITCH": TILED_OUT_PITCH,
                "CONSUMER_REGISTERS": consumer_registers,
                "PRODUCER_REGISTERS": producer_registers,
                "SHARED_BYTES": self.shared_bytes,
            }
        )


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
    return _decode_linear(x, weight, None)


def decode_linear_partial(x: Tensor, weight: PackedLinear, peers: Peers) -> Tensor:
    """`decode_linear` for a partial sum: the kernel sends it to the other ranks, whose `add_norm_route` adds it up."""
    return _decode_linear(x, weight, peers)


def _decode_linear(x: Tensor, weight: PackedLinear, peers: Peers | None) -> Tensor:
    tile = tile_for(x.shape[0], weight.rows, weight.columns)
    return launch_tiled(tile, x, weight, peers) if tile else launch(kernel_for(x.shape[0]), x, weight, peers)


def tile_for(tokens: int, rows: int, columns: int) -> Tile | None:
    """How the kernel tiled divides so many tokens, or None where it does not take them or `kernel_for`'s is faster."""
    fewest = next(fewest for more_than, fewest in TILED_FROM if rows > more_than)
    if not fewest <= tokens <= MOST_TILED_TOKENS or rows % 8 or columns // STEP_COLUMNS < splits_of(rows):
        return None
    blocks = -(-rows // 64)  # a tile's, with one warpgroup each
    # Two tiles where all of their blocks find a multiprocessor each, or where one has not the registers.
    tiles = 1 if tokens <= 96 or (tokens <= 128 and 2 * blocks > MULTIPROCESSORS) else 2
    tile_tokens = next(most for most in TILED_TOKENS if tokens <= most * tiles)
    if rows > MOST_PROJECTION_ROWS:  # blocks take many items: the larger, the fewer times tokens are read
        return Tile(3, tile_tokens, 2 // tiles, tiles)
    return Tile(1 if blocks * tiles <= MULTIPROCESSORS else 2, tile_tokens, 2, tiles)


def tiles(rows: int, columns: int) -> set[Tile]:
    """All that `tile_for` returns for a weight of this shape."""
    return {tile for tokens in range(MOST_TILED_TOKENS + 1) if (tile := tile_for(tokens, rows, columns))}


def kernel_for(tokens: int) -> str:
    """Where `tile_for` has nothing: up to 8 tokens x is small beside a strip of weights and is read for each; above, a
    cluster keeps it."""
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
    area = _area(peers, weight.rows, tokens)
    kernel.launch(grid=grid, block=warps * 32, args=(weight.tiles, x, weight.bias, out, weight.rows, tokens, *area))
    return out


def launch_tiled(tile: Tile, x: Tensor, weight: PackedLinear, peers: Peers | None = None) -> Tensor:
    """The same by the kernel tiled, for as many tokens as a cluster takes."""
    tokens = x.shape[0]
    check_input(x, weight)
    if tokens > tile.tile_tokens * tile.cluster_tokens:
        raise ValueError(f"{tile} takes up to {tile.tile_tokens * tile.cluster_tokens} tokens, not {tokens}")
    out = torch.empty(tokens, weight.rows, dtype=torch.bfloat16, device=x.device)
    defines = tile.defines(geometry(weight.rows, weight.columns), peers.size if peers else 1)
    kernel = load_kernel(FOLDER / "tiled.cu", "tiled", defines, tile.shared_bytes)
    items = -(-weight.rows // (64 * tile.consumers * tile.cluster_rows))
    clusters = min(items, kernel.resident_clusters(tile.blocks, tile.threads))
    boxes = TensorMap(x, (tile.tile_tokens // tile.cluster_rows, 2 * STEP_COLUMNS))
    area = _area(peers, weight.rows, tokens)
    kernel.launch(
        grid=(clusters * tile.blocks, 1, 1),
        block=tile.threads,
        args=(weight.tiles, boxes, weight.bias, out, weight.rows, tokens, *area),
    )
    return out


def _area(peers: Peers | None, rows: int, tokens: int) -> tuple[Tensor | None, int, int]:
    """The arguments of a kernel that sends so many rows to the other ranks; without peers, nowhere."""
    if peers is None:
        return None, 0, 0
    return exchange_arguments(peers, peers.attention, 2 * rows * one_shot_rows(tokens, peers.size))


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
