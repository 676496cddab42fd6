"""The part of the Hopper sampler that needs no GPU: how a row is cut over blocks."""

import pytest

from kernels.hopper.sampler import BLOCKS, SHARED_LIMIT, THREADS, layout


@pytest.mark.parametrize("vocab", [20, 31, 512, 1000, 201088])
def test_the_parts_cover_the_vocabulary_in_whole_warps(vocab):
    part, shared_bytes = layout(vocab, 20)
    assert part % 32 == 0
    assert part * BLOCKS >= vocab > (part - 32) * BLOCKS
    assert 4 * part + 8 * 20 * (part / THREADS) <= shared_bytes <= SHARED_LIMIT


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1000000"):
        layout(1_000_000, 20)
