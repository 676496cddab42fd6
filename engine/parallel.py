"""Tensor-parallel ranks and their collectives on CPUs.

Every rank holds its shard of the weights and replays the same buckets; rank 0 schedules. Knows tensors; no requests.
What GPUs exchange is their kernels' business.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Implements `kernels.ops.Ranks` through gloo. With one rank every collective is the identity."""

    def __init__(self, rank: int, size: int, run_folder: Path) -> None:
        """Joins the others through a file in `run_folder`; blocks until all have come."""
        self.rank = rank
        self.size = size
        if size > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # ranks share a machine: nothing of theirs listens beyond it
            store = f"file://{run_folder / 'rendezvous'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)

    def close(self) -> None:
        """Leave the others. Another `Ranks` may then join others from this process."""
        if self.size > 1:
            dist.destroy_process_group()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, N] of each rank -> [R, ranks * N] on every rank."""
        if self.size == 1:
            return x
        shards = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(shards.unbind()), x.contiguous())
        return shards.transpose(0, 1).flatten(1)

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers, on every rank; also a barrier."""
        if self.size == 1:
            return number
        least = torch.tensor(number)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)
