"""Tensor-parallel ranks: collectives of CPUs, and the channel by which rank 0's steps reach the others.

Every rank holds its shard of the weights and replays the same buckets; rank 0 schedules. Knows tensors and packed
words; no requests. What GPUs exchange is their kernels' business.
"""

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process's place among the ranks. With one rank every collective is the identity."""

    def __init__(self, rank: int, size: int, run_folder: Path) -> None:
        """Joins the others through a file in `run_folder`; blocks until all have come."""
        self.rank = rank
        self.size = size
        if size > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # ranks share a machine: nothing of theirs listens beyond it
            store = f"file://{run_folder / 'rendezvous'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, N] of each rank -> [R, ranks * N] on every rank."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous())
        return parts.transpose(0, 1).flatten(1)

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers, on every rank; also a barrier. For start-up."""
        if self.size == 1:
            return number
        least = torch.tensor(number)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)


class StepChannel:
    """Steps from rank 0 to every other rank: a ring in shared memory, with sequence numbers instead of locks.

    The file holds the sequence number of each ring slot, that of the last step each rank has taken, and the slots. A
    writer stores the words before their number, a reader the other way round; x86 keeps that order.
    """

    SLOTS = 4

    def __init__(self, ranks: Ranks, words: int, run_folder: Path) -> None:
        """`words`: int32 words of the largest step. Every rank must call this."""
        path = run_folder / "steps"
        numbers = self.SLOTS + ranks.size
        width = words + 2  # the bucket's index and the number of words first
        if ranks.rank == 0:
            path.write_bytes(bytes(8 * numbers + 4 * self.SLOTS * width))
        ranks.smallest(0)
        with path.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), 0)
        self._rank = ranks.rank
        self._sent = np.frombuffer(shared, np.int64, self.SLOTS)
        self._taken = np.frombuffer(shared, np.int64, ranks.size, 8 * self.SLOTS)
        self._slots = np.frombuffer(shared, np.int32, offset=8 * numbers).reshape(self.SLOTS, width)
        self._number = 0

    def send(self, bucket: int, words: np.ndarray) -> None:
        """Rank 0: hand a step to the others; waits while one of them is SLOTS steps behind."""
        self._number += 1
        _wait_until(lambda: self._taken[1:].min(initial=self._number) > self._number - 1 - self.SLOTS)
        slot = self._slots[self._number % self.SLOTS]
        slot[0], slot[1] = bucket, len(words)
        slot[2 : 2 + len(words)] = words
        self._sent[self._number % self.SLOTS] = self._number

    def receive(self, words: np.ndarray) -> int:
        """Others: wait for the next step, copy its words into the head of `words`, return its bucket's index."""
        self._number += 1
        place = self._number % self.SLOTS
        _wait_until(lambda: self._sent[place] == self._number)
        slot = self._slots[place]
        bucket, count = int(slot[0]), int(slot[1])
        words[:count] = slot[2 : 2 + count]
        self._taken[self._rank] = self._number
        return bucket


def _wait_until(holds: Callable[[], bool]) -> None:
    pause = 10e-6  # seconds; grows to a millisecond, so that an idle server costs next to nothing
    while not holds():
        time.sleep(pause)
        pause = min(pause * 1.1, 1e-3)
