"""Answers that a later request may name: kept in memory, within bounds of number, bytes and time.

Knows bytes and owners, not what an answer is. The oldest goes first.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple


class Stored(NamedTuple):
    """One answer."""

    response: bytes  # as the client got it
    conversation: bytes  # all that was said until then, the answer included
    items: dict[str, bytes]  # what belongs to the answer's parts, by their ids


class ResponseStore:
    """Answers by owner and id; one owner's are not there for another."""

    def __init__(
        self, max_entries: int, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`max_bytes`: of all entries together. `seconds`: for which one is kept."""
        self._max_entries, self._max_bytes, self._seconds, self._clock = max_entries, max_bytes, seconds, clock
        self._entries: OrderedDict[tuple[bytes, str], tuple[float, Stored]] = OrderedDict()
        self._by_item: dict[tuple[bytes, str], str] = {}  # (owner, id of an item) -> id of its answer
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, owner: bytes, id: str, stored: Stored) -> None:
        """Keep an answer under a new id. One that is larger than all there is room for is not kept."""
        self._expire()
        if _size(stored) > self._max_bytes:
            return
        self._entries[owner, id] = (self._clock(), stored)
        self._by_item |= {(owner, item): id for item in stored.items}
        self.bytes += _size(stored)
        while len(self._entries) > self._max_entries or self.bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def get(self, owner: bytes, id: str) -> Stored | None:
        """The answer; None where there is none, or no longer."""
        self._expire()
        _, stored = self._entries.get((owner, id), (0.0, None))
        return stored

    def item(self, owner: bytes, item_id: str) -> bytes | None:
        """A part of an answer; None where there is none, or no longer."""
        stored = self.get(owner, self._by_item.get((owner, item_id), ""))
        return stored.items[item_id] if stored else None

    def delete(self, owner: bytes, id: str) -> bool:
        """Whether there was one to forget."""
        self._expire()
        if (owner, id) not in self._entries:
            return False
        self._remove((owner, id))
        return True

    def _expire(self) -> None:
        now = self._clock()
        while self._entries:
            key, (since, _) = next(iter(self._entries.items()))
            if now - since < self._seconds:
                return
            self._remove(key)

    def _remove(self, key: tuple[bytes, str]) -> None:
        _, stored = self._entries.pop(key)
        for item in stored.items:
            del self._by_item[key[0], item]
        self.bytes -= _size(stored)


def _size(stored: Stored) -> int:
    return len(stored.response) + len(stored.conversation) + sum(map(len, stored.items.values()))
