"""Memory through which the ranks' kernels exchange what they add up: every rank can write to that of the others.

Who writes what and when, and why no flags are needed, is said in norm.cu and sampler.cu. Knows bytes and addresses.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from conf.schema import ConfigError

EMPTY = 0xFF  # every byte of what nobody has written
SAMPLER_WORDS = 2 * 5 * 256 + 64  # 8-byte words of a row: five histograms of two searches, and a few more


@dataclass(frozen=True)
class Area:
    """A range of every rank's memory, the same in each. memories [ranks] int64: their addresses; none for one rank."""

    memories: Tensor | None
    offset: int
    bytes: int
    rank: int

    def arguments(self, needed: int) -> tuple[Tensor | None, int, int]:
        """What a kernel takes that exchanges `needed` bytes. Raises ValueError where they do not fit."""
        if self.memories is not None and needed > self.bytes:
            raise ValueError(f"an exchange of {needed} bytes in an area of {self.bytes}: more rows than `join` knew of")
        return self.memories, self.offset, self.rank


@dataclass(frozen=True)
class Peers:
    """The ranks as the operations see them: an area for each place of the forward where they exchange."""

    rank: int
    size: int
    attention: Area
    mlp: Area
    sampler: Area
    mapped: Any = None  # what keeps the memories mapped


ALONE = Peers(0, 1, *[Area(None, 0, 0, 0)] * 3)


def join(ranks: Any, decode_rows: int, prefill_tokens: int, sequences: int, hidden: int, device: torch.device) -> Peers:
    """Share memory with the other ranks: all of them must call this. ranks: `rank`, `size` and the barrier `smallest`.

    decode_rows, prefill_tokens, sequences: the most of a step; a kernel refuses more. Raises ConfigError where the GPUs
    cannot reach each other's memory.
    """
    rank, size = ranks.rank, ranks.size
    if size == 1:
        return ALONE
    rows = max(size * decode_rows, 2 * prefill_tokens + size)  # a slot a rank, or all ranks' shares and the sums
    sizes = [2 * hidden * rows, 2 * hidden * rows, 8 * SAMPLER_WORDS * size * max(decode_rows, sequences)]
    if sum(sizes) >= 2**31:  # kernels take offsets as int32
        raise ConfigError(
            f"buckets.prefill_tokens: got {prefill_tokens}, allowed: fewer with tp={size}: they exchange "
            "through 2 GiB at most"
        )
    for other in range(min(size, torch.cuda.device_count())):
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            raise ConfigError(f"tp: got {size}, allowed: 1, as GPU {device.index} cannot access GPU {other}'s memory")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here multicasts
    own = symmetric_memory.empty(sum(sizes), dtype=torch.uint8, device=device)
    shared = symmetric_memory.rendezvous(own, dist.group.WORLD)
    own.fill_(EMPTY)
    torch.cuda.synchronize()
    ranks.smallest(0)  # nobody writes before all are empty
    memories = torch.tensor(
        [shared.get_buffer(peer, own.shape, own.dtype).data_ptr() for peer in range(size)], device=device
    )
    areas = [Area(memories, sum(sizes[:place]), count, rank) for place, count in enumerate(sizes)]
    return Peers(rank, size, *areas, mapped=(own, shared))
