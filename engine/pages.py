"""The pool of key/value pages: free list, reference counts and prefix cache.

Knows page numbers, digests and token ids. Does not know requests, slots or steps, nor where a page lies in memory.
"""

import hashlib
import struct
from collections import OrderedDict
from itertools import islice

from conf.limits import PAGE_TOKENS, SCRATCH_PAGE

_PAGE_OF_TOKENS = struct.Struct(f"<{PAGE_TOKENS}i")


def extend_chain(digests: list[bytes], tokens: list[int], salt: bytes = b"") -> None:
    """Appends to `digests` one SHA-256 digest for each full page of `tokens` that it does not cover yet.

    A digest is that of the previous digest followed by the page's token ids, so it names the page's whole history:
    equal digests mean equal keys and values. A cryptographic hash, because clients choose the tokens and a collision
    would answer one client with another's text. `salt` stands before the first page: chains of different salts share
    no digest.
    """
    for start in range(len(digests) * PAGE_TOKENS, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = _PAGE_OF_TOKENS.pack(*tokens[start : start + PAGE_TOKENS])
        digests.append(hashlib.sha256((digests[-1] if digests else salt) + page).digest())


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


class PagePool:
    """`pages` pages in memory, of which all but the scratch page can be held.

    A page is free, held (by one holder, or by several through `match`), or idle: registered under a digest and held
    by nobody. Idle pages stay matchable until they are needed; the least recently released goes first.
    """

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise ValueError(f"a page pool of {pages} pages: needs at least 2, the scratch page and one to use")
        self.total = pages - 1
        self._free = list(range(pages - 1, SCRATCH_PAGE, -1))  # a stack: the page freed last is taken first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._references = [0] * pages
        self._digests: list[bytes | None] = [None] * pages
        self._registered: dict[bytes, int] = {}  # digest -> page, held or idle

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.total - self.available

    def match(self, digests: list[bytes], limit: int) -> list[int]:
        """The longest registered chain at the start of `digests`, at most `limit` pages; now held by the caller."""
        pages = []
        for digest in islice(digests, limit):
            page = self._registered.get(digest)
            if page is None:
                break
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages of undefined content, held by the caller; None, and no change, where there are fewer."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Makes a held, full page matchable. Where another page has the digest already, that one stays."""
        if self._registered.setdefault(digest, page) == page:
            self._digests[page] = digest

    def release(self, pages: list[int]) -> None:
        """Gives back one hold on each of `pages`, which are in the order of their chain.

        From the last to the first, so that the deeper pages of the chain are evicted before the shallower: a chain
        that has lost its head can't be matched at all.
        """
        for page in reversed(pages):
            if self._references[page] < 1:
                raise ValueError(f"page {page} is released, but nobody holds it")
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        if (digest := self._digests[page]) is not None:
            del self._registered[digest]
        self._digests[page] = None
        return page
