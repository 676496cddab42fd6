"""What of the Hopper sampler needs no GPU: how a row is cut over blocks, and where ranks exchange."""

import pytest

from kernels.hopper.sampler import BINS, COLUMNS, LEVELS, ROW_BLOCKS, SHARED_LIMIT, exchange_words, layout, word_places


@pytest.mark.parametrize("vocab", [20, 31, 512, 1000, 201088])
def test_the_ranges_cover_the_vocabulary_in_whole_warps(vocab):
    size, shared_bytes = layout(vocab, 20)
    assert size % 32 == 0
    assert size * ROW_BLOCKS >= vocab > (size - 32) * ROW_BLOCKS
    assert 4 * size + 2 * 8 * 20 * (size / COLUMNS) <= shared_bytes <= SHARED_LIMIT


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1000000"):
        layout(1_000_000, 20)


@pytest.mark.parametrize("top", [1, 5, 20])
def test_no_two_words_of_an_exchange_share_a_place(top):
    places = word_places(top)
    searches = range(2 * LEVELS * BINS)  # a histogram for each level of top_k's and of top_p's
    best = [places["BEST"] + n for n in range(top)]
    words = [*searches, places["PEAK"], *best, places["SUM"], places["DRAWN"], places["LOGIT"]]
    assert sorted(words) == list(range(exchange_words(top)))
