"""How Hopper's attention divides its work, and what it refuses; both are settled before a GPU is asked."""

import pytest
import torch

from kernels.hopper.attention import (
    MOST_SPLIT_PAGES,
    MOST_SPLITS,
    SPLIT_PAGES,
    decode_attention,
    plan_of,
    prefill_attention,
    tile_of,
)

PAGE = 64


def splits_at(position, window):
    """As attention.cu cuts the keys that a token sees."""
    first = max(0, position - window + 1) if window else 0
    pages, size = position // PAGE - first // PAGE + 1, SPLIT_PAGES
    while size * MOST_SPLITS < pages:
        size *= 2
    assert size <= MOST_SPLIT_PAGES
    return -(-pages // size)


@pytest.mark.parametrize("window", [None, 1, 2, 64, 65, 128, 192, 193, 194, 700, 10**6])
@pytest.mark.parametrize("width", [1, 3, 4, 5, 16, 255, 256, 257, 2048])
def test_scratch_memory_has_room_for_the_splits_of_every_position(width, window):
    plan = plan_of(8, 8, width, window, 132)
    most = max(splits_at(position, window) for position in range(0, width * PAGE, 7 if width > 16 else 1))
    assert most <= plan.most <= most + 1


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("tokens", [1, 64, 256])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_a_launch_fits_the_machine_and_scratch_memory_stays_small(tokens, kv_heads, window):
    plan = plan_of(tokens, kv_heads, 2048, window, 132)
    assert 1 <= plan.blocks <= 3 * 132
    assert plan.most == 1 or tokens * kv_heads * plan.most * 8 * 66 * 4 < 300e6
    assert (plan.most == 1) == (window is not None)


def arguments(columns=20 * 64, dim=64, page=64, dtype=torch.bfloat16, index=torch.int32, tokens=4):
    pool = torch.zeros(3, 2, page, dim, dtype=dtype)
    qkv, angles = torch.zeros(tokens, columns, dtype=torch.bfloat16), torch.zeros(64, 32)
    at, table = torch.zeros(tokens, dtype=index), torch.zeros(5, 3, dtype=index)
    return qkv, angles, angles, at, at, table, pool, pool, torch.zeros(16)


@pytest.mark.parametrize("attention", [decode_attention, prefill_attention])
@pytest.mark.parametrize(
    ("options", "window", "named"),
    [
        ({"dim": 32}, None, "64"),
        ({"page": 16}, None, "64"),
        ({"columns": 19 * 64}, None, "15 query heads over 2"),
        ({"columns": 38 * 64}, None, "34 query heads over 2"),
        ({"columns": 4 * 64}, None, "0 query heads"),
        ({"columns": 20 * 64 + 1}, None, "not a multiple"),
        ({"dtype": torch.float16}, None, "bfloat16"),
        ({"index": torch.int64}, None, "int32"),
        ({}, 0, "window 0"),
    ],
)
def test_attention_refuses_what_its_kernels_cannot_do(attention, options, window, named):
    with pytest.raises(ValueError, match=named):
        attention(*arguments(**options), window)


def test_decode_refuses_more_tokens_than_its_search_holds():
    with pytest.raises(ValueError, match="257 tokens"):
        decode_attention(*arguments(tokens=257), None)


def test_a_page_table_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="8193 pages"):
        plan_of(1, 8, 8193, None, 132)


@pytest.mark.parametrize("group", range(1, 17))
def test_the_rows_of_a_prefill_tile_name_each_of_its_tokens_and_heads_once(group):
    """As prefill_attention.cu gives rows of its warpgroups to threads."""
    consumers, of_group = 3, tile_of(group) // 3
    assert tile_of(group) <= 32
    rows = []
    for consumer in range(consumers):
        for warp in range(4):
            for lane in range(0, 32, 4):  # the four lanes of a row hold its columns
                for r in range(2):
                    row = warp * 16 + lane // 4 + 8 * r
                    if row < of_group * group:
                        rows.append((consumer * of_group + row // group, row % group))
    assert sorted(rows) == [(token, head) for token in range(tile_of(group)) for head in range(group)]


def page_in_shared_memory(page):
    """[64 rows, 64] as both kernels copy it: 16-byte chunk c of row r at c ^ r % 8."""
    chunks, place = page.view(64, 8, 8), torch.arange(8)
    return torch.stack([chunks[r, place ^ r % 8] for r in range(64)]).flatten()


def test_wgmmas_descriptors_name_the_keys_and_values_of_a_page():
    """The canonical layouts of PTX for 128-byte swizzles, walked with the descriptors of prefill_attention.cu."""
    page = torch.arange(64 * 64).view(64, 64)
    shared = page_in_shared_memory(page)

    def at(byte):  # the hardware's swizzle: address bits 4-6 by bits 7-9
        return shared[(byte ^ (byte >> 7 & 7) << 4) // 2]

    n, k = torch.meshgrid(torch.arange(64), torch.arange(16), indexing="ij")
    for step in range(4):
        keys = at(32 * step + n // 8 * 1024 + n % 8 * 128 + k * 2)  # K-major: n are keys, k dimensions
        assert torch.equal(keys, page[:, 16 * step : 16 * step + 16])
        values = at(2048 * step + k // 8 * 1024 + k % 8 * 128 + n * 2)  # MN-major: n are dimensions, k keys
        assert torch.equal(values, page[16 * step : 16 * step + 16].T)


@pytest.mark.parametrize("stages", [8])
@pytest.mark.parametrize("counts", [(1,), (2,), (3, 1), (8,), (9, 2, 1, 30), (1,) * 24, (40, 3)])
def test_the_ring_of_pages_never_stalls_or_overtakes(stages, counts):
    """The producer hands a page over two pages later; a consumer gives it back once it has the next one's scores."""
    lag, total, consumers = 2, sum(counts), 3
    ends = {sum(counts[: n + 1]) - 1 for n in range(len(counts))}  # last pages of runs
    handed, given = 0, [0] * consumers  # pages handed over; pages given back by each consumer
    issued, taken = 0, [0] * consumers
    while min(given) < total:
        before = (issued, handed, tuple(given), tuple(taken))
        if issued < total and issued - min(given) < stages:
            issued += 1
            handed = max(handed, issued - lag)
        elif issued == total:
            handed = total
        for consumer in range(consumers):
            if taken[consumer] < handed:
                taken[consumer] += 1
                given[consumer] = taken[consumer] if taken[consumer] - 1 in ends else taken[consumer] - 1
        assert (issued, handed, tuple(given), tuple(taken)) != before, "stalled"
        assert issued - min(given) <= stages
