"""The channel by which rank 0's steps reach the other ranks. Knows packed inputs; no requests and no tensors."""

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conf.schema import ConfigError
from kernels.ops import Ranks


class StepChannel:
    """Steps from rank 0 to every other rank: a ring in shared memory, with sequence numbers instead of locks.

    The file holds the sequence number of each of the ring's entries, that of the last step each rank has taken, and the
    entries. A writer stores an entry before its number, a reader loads the number first; x86 keeps that order.
    """

    DEPTH = 4  # entries of the ring

    def __init__(self, ranks: Ranks, words: int, run_folder: Path) -> None:
        """`words`: int32 words of the largest step's packed inputs. Every rank must call this: it is a barrier.

        Raises ConfigError where the folder for temporary files has no room.
        """
        path = run_folder / "steps"
        numbers = self.DEPTH + ranks.size
        width = words + 2  # the bucket's index and the number of words first
        if ranks.rank == 0:
            data = bytes(8 * numbers + 4 * self.DEPTH * width)
            try:
                path.write_bytes(data)
            except OSError as error:
                raise ConfigError(f"TMPDIR: cannot write {len(data)} bytes in {path}: {error.strerror}") from error
        ranks.smallest(0)
        with path.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), 0)
        self._rank = ranks.rank
        self._sent = np.frombuffer(shared, np.int64, self.DEPTH)
        self._taken = np.frombuffer(shared, np.int64, ranks.size, 8 * self.DEPTH)
        self._entries = np.frombuffer(shared, np.int32, offset=8 * numbers).reshape(self.DEPTH, width)
        self._number = 0

    def send(self, bucket: int, words: npt.NDArray[np.int32]) -> None:
        """Rank 0: hand a step to the others. Waits while one of them is DEPTH steps behind; for ever for a dead one."""
        self._number += 1
        _wait_until(lambda: self._taken[1:].min(initial=self._number) > self._number - 1 - self.DEPTH)
        entry = self._entries[self._number % self.DEPTH]
        entry[0], entry[1] = bucket, len(words)
        entry[2 : 2 + len(words)] = words
        self._sent[self._number % self.DEPTH] = self._number

    def receive(self, words: npt.NDArray[np.int32]) -> int:
        """Others: wait for the next step, copy its packed inputs to the head of `words`, return its bucket's index."""
        self._number += 1
        place = self._number % self.DEPTH
        _wait_until(lambda: self._sent[place] == self._number)
        entry = self._entries[place]
        bucket, count = int(entry[0]), int(entry[1])
        words[:count] = entry[2 : 2 + count]
        self._taken[self._rank] = self._number
        return bucket


def _wait_until(holds: Callable[[], bool]) -> None:
    pause = 10e-6  # seconds; grows to a millisecond, so that an idle server costs next to nothing
    while not holds():
        time.sleep(pause)
        pause = min(pause * 1.1, 1e-3)
