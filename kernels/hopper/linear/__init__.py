"""Dense layers on Hopper: `kernels.reference.linear` over weights packed once, when they are loaded.

The layout and the reasons for it are in linear.cu. Knows tensors; which layer they belong to is the caller's business.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module
from kernels.hopper.peers import ALONE, Peers

ROWS = 16  # rows of a strip: M of the multiply
STEP = 32  # columns of a packed tile: two fragments
MOST_PROJECTION_ROWS = 8192  # fewer rows are few strips: more warps on each keep more loads in flight
PITCH = ROWS + 4  # floats from one token's partial sums to the next

NARROW_TOKENS = (2, 8)  # that the kernels narrow_2 and narrow_8 take
WIDE_TOKENS = (16, 32, 64)  # and wide_16, ...; above 64 the grid tiles tokens by 64


@dataclass(frozen=True)
class PackedLinear:
    """tiles [strips of 16 rows, steps of 32 columns, 2 fragments, 32 lanes, 8] bf16, zero past the last row; rows is N.

    Row 8h + g and column 16s + 8p + 2t + e of a tile lie in fragment s, lane 4g + t, at 4p + 2h + e: as the PTX ISA
    lays out the A operand of mma.m16n8k16, and a warp's part of that of wgmma.m64nNk16. Columns are in natural order.
    """

    tiles: Tensor
    rows: int

    @property
    def columns(self) -> int:
        return self.tiles.shape[1] * STEP


def pack(weight: Tensor) -> PackedLinear:
    """weight [N, K] bf16 on any device -> its packed copy on the same device, made without any other scratch memory."""
    if weight.dim() != 2 or weight.dtype != torch.bfloat16 or weight.shape[1] % STEP:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype}: [N, K] bfloat16 with K a multiple of {STEP} is "
            "what can be packed"
        )
    rows, columns = weight.shape
    whole = rows // ROWS  # strips without padding
    tiles = torch.empty(-(-rows // ROWS), columns // STEP, 2, 32, 8, dtype=weight.dtype, device=weight.device)
    as_given = tiles.view(*tiles.shape[:3], 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)  # strip h g step s p t e
    columns_apart = weight.view(rows, -1, 2, 2, 4, 2)  # step s p t e
    as_given[:whole] = columns_apart[: whole * ROWS].unflatten(0, (-1, 2, 8))
    for row in range(rows % ROWS):
        as_given[whole, row // 8, row % 8] = columns_apart[whole * ROWS + row]
    for row in range(rows % ROWS or ROWS, ROWS):
        as_given[whole, row // 8, row % 8] = 0
    return PackedLinear(tiles, rows)


def linear(x: Tensor, weight: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """x [T, K] bf16, bias [N] bf16 -> [T, N] bf16. A token's bytes do not depend on the others nor on T."""
    return launch(kernel_for(x.shape[0]), x, weight, bias)


def linear_part(x: Tensor, weight: PackedLinear, bias: Tensor | None, peers: Peers) -> Tensor:
    """`linear` for a result that the ranks add up in `add_norm_route`: it is sent to them from where it is made."""
    return launch(kernel_for(x.shape[0]), x, weight, bias, peers)


def kernel_for(tokens: int) -> str:
    """Up to 8 tokens x is small beside a strip of weights and is read for each; above, a cluster keeps it."""
    if tokens <= NARROW_TOKENS[-1]:
        return f"narrow_{next(most for most in NARROW_TOKENS if tokens <= most)}"
    return f"wide_{next((tile for tile in WIDE_TOKENS if tokens <= tile), WIDE_TOKENS[-1])}"


def launch(name: str, x: Tensor, weight: PackedLinear, bias: Tensor | None, peers: Peers = ALONE) -> Tensor:
    """`linear_part` by the kernel of that name: every one gives the same bytes."""
    tokens, tile = x.shape[0], int(name.split("_")[1])
    check(x, weight, bias)
    out = torch.empty(tokens, weight.rows, dtype=torch.bfloat16, device=x.device)
    if not tokens:
        return out
    strips, shares = weight.tiles.shape[0], shares_of(weight.rows, weight.columns)
    if name.startswith("narrow"):
        if tokens > tile:
            raise ValueError(f"{name} takes up to {tile} tokens, not {tokens}")
        grid, warps, shared = (strips, 1, 1), shares, narrow_shared(name, weight.columns, shares, tokens)
    else:
        resident = _resident(name, weight.columns, shares, peers.size)
        warps, clusters = wide_grid(strips, most_warps(weight.columns, shares), resident)
        grid, shared = (shares, -(-tokens // tile), clusters), wide_shared(tile, weight.columns, shares, warps)
    kernel = _kernel(name, weight.columns, shares, shared, peers.size)
    area = peers.attention.arguments(2 * weight.rows * tokens * peers.size)
    kernel.launch(grid=grid, block=warps * 32, args=(weight.tiles, x, bias, out, weight.rows, tokens, *area))
    return out


def check(x: Tensor, weight: PackedLinear, bias: Tensor | None) -> None:
    """Raises ValueError for an input or a bias that does not fit the weight."""
    if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[1:] != (weight.columns,) or x.data_ptr() % 16:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}: a contiguous, 16-byte aligned [T, {weight.columns}] bfloat16 "
            "is what this layer takes"
        )
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != (weight.rows,)):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype}: [{weight.rows}] bfloat16 is what this layer takes")


def shares_of(rows: int, columns: int) -> int:
    """Runs of columns that are added up apart: warps of a narrow block, blocks of a wide cluster.

    A function of the weight's shape alone, so that a token's bytes do not depend on how many there are.
    """
    return 8 if rows <= MOST_PROJECTION_ROWS else 4


def most_warps(columns: int, shares: int) -> int:
    """Of a wide block, as in linear.cu: each takes a strip at a time."""
    return 20 if columns // STEP // shares <= 12 else 16


def wide_grid(strips: int, most: int, resident: int) -> tuple[int, int]:
    """Warps of a block, and clusters: all of them resident at once, in as few rounds over groups of strips as blocks of
    up to `most` warps can make, each round as full as the others."""
    rounds = -(-strips // (resident * most))
    warps = -(-strips // (resident * rounds))
    return warps, min(resident, -(-strips // warps))


def narrow_shared(name: str, columns: int, shares: int, tokens: int) -> int:
    """Bytes of dynamic shared memory: x, and narrow_2's steps of a projection that registers do not hold."""
    steps, kept = columns // STEP, 0
    if name == "narrow_2" and shares == 8:
        kept = max(-(-steps // shares) - (6 if steps // shares <= 12 else 8), 0)  # NARROW_DEPTH
    return kept * shares * 1024 + tokens * x_pitch(columns)


def wide_shared(tile: int, columns: int, shares: int, warps: int) -> int:
    """Bytes of dynamic shared memory: the longest share of x, and every share's sums of the units a block adds up."""
    steps = -(-(columns // STEP) // shares)
    units = -(-warps * (tile // 8) // shares)  # of 16 rows by 8 tokens, each 512 bytes
    return tile * steps * STEP * 2 + units * shares * 512


def x_pitch(columns: int) -> int:
    """Bytes from one token of x to the next in a narrow block's shared memory."""
    return -(-columns * 2 // 128) * 128 + 16


@cache
def _kernel(name: str, columns: int, shares: int, shared: int, ranks: int) -> Kernel:
    defines = {"COLUMNS": columns, "SHARES": shares, "RANKS": ranks}
    return compile_module(Path(__file__).with_name("linear.cu"), defines).kernel(name, shared_bytes=shared)


@cache
def _resident(name: str, columns: int, shares: int, ranks: int) -> int:
    """Clusters of the largest blocks that the device holds at once: a cluster stays within a GPC, and not all of those
    have the same number of multiprocessors."""
    warps = most_warps(columns, shares)
    shared = wide_shared(int(name.split("_")[1]), columns, shares, warps)
    return _kernel(name, columns, shares, shared, ranks).resident_clusters(shares, warps * 32)
