"""Dense layers of a prefill step: how prefill.cu is launched, over the weights that `pack` of this package made.

A token's bytes depend on itself alone, whatever the prompt was cut into and whoever shares the step; they are not those
of the decode kernels.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import MOST_SHARED, TensorMap, load_kernel
from kernels.hopper.linear import check_input
from kernels.ops import PackedLinear, Peers

CLUSTER = 2  # blocks that share a tile's tokens
CLUSTERS = 66  # of them on an H100 or H200 at once
DEPTH = 64  # columns of a turn
UNROLL = 8  # turns in which a product is always under way
STAGED_TOKENS = 32  # whose outputs a warpgroup stages at a time: a divisor of every tile
MOST_STAGES = 12
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24  # of a thread


class PrefillGeometry(NamedTuple):
    """How prefill.cu cuts a layer."""

    consumers: int  # warpgroups of a block that multiply, 64 weight rows each
    tokens: int  # of a tile

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    def items(self, rows: int, tokens: int) -> int:
        """A cluster's rows by a tile of tokens each."""
        return -(-rows // (64 * self.consumers * CLUSTER)) * -(-tokens // self.tokens)

    def defines(self, columns: int) -> dict[str, int]:
        """The macros of prefill.cu."""
        stage_bytes = self.tokens * DEPTH * 2
        out_bytes = self.consumers * STAGED_TOKENS * (64 + 8) * 2  # a consumer's 64 outputs of a token, 8 apart
        room = MOST_SHARED - 1024  # to align the stages
        stages = min((room - MOST_STAGES * 16 - out_bytes) // stage_bytes, MOST_STAGES)  # with two mbarriers each
        return {
            "COLUMNS": columns,
            "CONSUMERS": self.consumers,
            "TOKENS": self.tokens,
            "CLUSTER": CLUSTER,
            "DEPTH": DEPTH,
            "STAGES": stages,
            "BUFFERS": 8 if self.tokens <= 64 else 4,  # of weights: few tokens leave registers, and need more under way
            "UNROLL": UNROLL,
            "STAGED_TOKENS": STAGED_TOKENS,
            "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
            "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
            "SHARED_BYTES": stages * stage_bytes + out_bytes + 1024,
        }


GEOMETRIES = (PrefillGeometry(1, 64), *(PrefillGeometry(2, tokens) for tokens in (64, 128, 160, 192, 224, 256)))


def prefill_geometry(rows: int, tokens: int) -> PrefillGeometry:
    """The fastest for weights of so many rows, as measured on the 20b. All give the same bytes.

    Clusters take items in turn, and all wait for the last turn. One takes as long as 110 tokens, and as those of the
    tile, are multiplied; 15 % less with a single consumer.
    """

    def time(geometry: PrefillGeometry) -> float:
        turns = -(-geometry.items(rows, tokens) // CLUSTERS)
        return turns * (geometry.tokens + 110) * (0.85 if geometry.consumers == 1 else 1.0)

    return min(GEOMETRIES, key=time)


def prefill_linear(x: Tensor, weight: PackedLinear) -> Tensor:
    """x [T, K] bf16 -> [T, N] bf16. Raises ValueError for an x that does not fit, and for N not a multiple of 8."""
    tokens = x.shape[0]
    check_input(x, weight)
    if weight.rows % 8:
        raise ValueError(f"{weight.rows} rows: a multiple of 8, which prefill stores in pieces of 16 bytes")
    out = torch.empty(tokens, weight.rows, dtype=torch.bfloat16, device=x.device)
    geometry = prefill_geometry(weight.rows, tokens)
    defines = geometry.defines(weight.columns)
    kernel = load_kernel(Path(__file__).with_name("prefill.cu"), "prefill_linear", defines, defines["SHARED_BYTES"])
    clusters = torch.cuda.get_device_properties(x.device).multi_processor_count // CLUSTER
    boxes = TensorMap(x, (geometry.tokens // CLUSTER, DEPTH))
    kernel.launch(
        grid=(CLUSTER * min(geometry.items(weight.rows, tokens), clusters), 1, 1),
        block=geometry.threads,
        args=(weight.tiles, boxes, weight.bias, out, weight.rows, tokens),
    )
    return out


def prefill_linear_partial(x: Tensor, weight: PackedLinear, peers: Peers) -> Tensor:
    """`prefill_linear` for a partial sum: `prefill_add_norm_route` sends it to the other ranks."""
    return prefill_linear(x, weight)
