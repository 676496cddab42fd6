"""The page pool: who holds what, what stays matchable, and in which order it goes."""

import hashlib
import struct

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from conf.limits import PAGE_TOKENS, SCRATCH_PAGE
from engine.pages import PagePool, extend_chain, pages_for


def chain(*pages: int) -> list[bytes]:
    """Digests of a sequence whose k-th page repeats the token `pages[k]`."""
    digests: list[bytes] = []
    extend_chain(digests, [token for page in pages for token in [page] * PAGE_TOKENS])
    return digests


def cached(pool: PagePool, *tokens: int) -> list[int]:
    """Computes a sequence, registers its pages and lets them go."""
    pages, digests = pool.allocate(len(tokens)), chain(*tokens)
    for page, digest in zip(pages, digests, strict=True):
        pool.register(page, digest)
    pool.release(pages)
    return pages


def test_a_digest_is_the_sha256_of_the_previous_digest_and_the_little_endian_token_ids():
    tokens = list(range(200_000, 200_000 + 2 * PAGE_TOKENS))
    digests: list[bytes] = []
    extend_chain(digests, tokens)
    first = hashlib.sha256(struct.pack("<64i", *tokens[:64])).digest()
    assert digests == [first, hashlib.sha256(first + struct.pack("<64i", *tokens[64:])).digest()]


def test_a_chain_covers_full_pages_only_and_grows_without_hashing_again():
    tokens = list(range(3 * PAGE_TOKENS))
    digests: list[bytes] = []
    extend_chain(digests, tokens[: PAGE_TOKENS - 1])
    assert digests == []
    extend_chain(digests, tokens[: 2 * PAGE_TOKENS - 1])
    assert len(digests) == 1
    digests[0] = b"kept as it is"
    extend_chain(digests, tokens)
    assert digests[1] == hashlib.sha256(b"kept as it is" + struct.pack("<64i", *tokens[64:128])).digest()
    assert len(digests) == 3


def test_the_digest_of_a_page_depends_on_everything_before_it():
    assert chain(1, 2)[1] != chain(3, 2)[1]


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_pages_for_rounds_up(tokens, pages):
    assert pages_for(tokens) == pages


def test_the_scratch_page_is_never_handed_out():
    pool = PagePool(4)
    assert pool.total == 3
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert pool.allocate(1) is None


def test_a_pool_needs_a_page_beside_the_scratch_page():
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(1)


def test_a_request_for_too_many_pages_takes_none():
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert (pool.available, pool.used) == (3, 0)


def test_pages_are_used_until_they_are_released():
    pool = PagePool(4)
    pages = pool.allocate(2)
    assert (pool.available, pool.used) == (1, 2)
    pool.release(pages)
    assert (pool.available, pool.used) == (3, 0)


def test_the_longest_cached_chain_is_matched_up_to_the_limit():
    pool = PagePool(8)
    pages = cached(pool, 1, 2, 3)
    assert pool.match(chain(1, 2, 9), 3) == pages[:2]
    assert pool.match(chain(1, 2, 3), 1) == pages[:1]
    assert pool.match(chain(9, 2, 3), 3) == []


def test_a_matched_page_is_held_and_stays_when_one_of_its_holders_goes():
    pool = PagePool(4)
    pages = cached(pool, 1, 2)
    assert pool.used == 0
    assert pool.match(chain(1, 2), 2) == pool.match(chain(1, 2), 2) == pages
    assert pool.used == 2
    pool.release(pages)
    assert pool.used == 2
    pool.release(pages)
    assert pool.used == 0


def test_cached_pages_are_evicted_only_when_no_page_is_free():
    pool = PagePool(5)
    pages = cached(pool, 1, 2)
    assert not set(pool.allocate(2)) & set(pages)
    assert pool.allocate(1) == pages[1:]
    assert pool.match(chain(1, 2), 2) == pages[:1]


def test_the_least_recently_used_chain_goes_first_and_its_deepest_page_before_the_others():
    pool = PagePool(5)
    old, young = cached(pool, 1, 2), cached(pool, 3, 4)
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], old[0], young[1], young[0]]


def test_a_match_makes_a_chain_recently_used():
    pool = PagePool(5)
    first, second = cached(pool, 1, 2), cached(pool, 3, 4)
    pool.release(pool.match(chain(1, 2), 2))
    assert pool.allocate(4) == [second[1], second[0], first[1], first[0]]


def test_an_evicted_page_can_be_registered_under_another_digest():
    pool = PagePool(2)
    cached(pool, 1)
    cached(pool, 2)
    assert pool.match(chain(1), 1) == []
    assert pool.match(chain(2), 1) == [1]


def test_the_first_page_with_a_digest_stays_and_the_second_is_free_once_released():
    pool = PagePool(3)
    pages = pool.allocate(2)
    for page in pages:
        pool.register(page, chain(7)[0])
    pool.release(pages)
    assert pool.match(chain(7), 1) == pages[:1]
    assert pool.allocate(1) == pages[1:]


def test_a_page_that_nobody_holds_cannot_be_released():
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="page 1 is released, but nobody holds it"):
        pool.release(pages)


class PoolMachine(RuleBasedStateMachine):
    """Against a model that remembers every hold and, for every page, what was written into it last."""

    @initialize(pages=st.integers(2, 12))
    def start(self, pages):
        self.pool = PagePool(pages)
        self.holds: list[tuple[list[int], list[int]]] = []  # (pages, the token that fills each of them)
        self.content: dict[int, bytes] = {}  # what lies in each page: the digest of its whole history

    def held(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for pages, _ in self.holds:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1
        return counts

    @rule(tokens=st.lists(st.integers(0, 1), max_size=6), register=st.booleans())
    def compute_a_sequence(self, tokens, register):
        """As a request does: match, allocate the rest, write it, register, hold."""
        digests, before = chain(*tokens), self.held()
        matched = self.pool.match(digests, len(digests))
        assert [self.content[page] for page in matched] == digests[: len(matched)]
        fresh = self.pool.allocate(len(tokens) - len(matched))
        if fresh is None:
            assert len(tokens) - len(matched) > self.pool.available
            self.pool.release(matched)
            return
        assert not set(fresh) & (before.keys() | set(matched) | {SCRATCH_PAGE})
        assert len(set(fresh)) == len(fresh)
        for page, digest in zip(fresh, digests[len(matched) :], strict=True):
            self.content[page] = digest
            if register:
                self.pool.register(page, digest)
        if register:
            found = self.pool.match(digests, len(digests))
            assert [self.content[page] for page in found] == digests
            self.pool.release(found)
        self.holds.append((matched + fresh, tokens))

    @rule(which=st.integers(0, 9))
    def release_a_sequence(self, which):
        if self.holds:
            pages, _ = self.holds.pop(which % len(self.holds))
            self.pool.release(pages)

    @invariant()
    def every_page_is_either_used_or_available(self):
        if hasattr(self, "pool"):
            assert self.pool.used == len(self.held())
            assert self.pool.available == self.pool.total - len(self.held())


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_chains_of_different_salts_share_no_digest():
    chains: list[list[bytes]] = [[], [], []]
    for chain, salt in zip(chains, (b"", b"a" * 32, b"b" * 32), strict=True):
        extend_chain(chain, list(range(3 * PAGE_TOKENS)), salt)
    assert len({digest for chain in chains for digest in chain}) == 9
