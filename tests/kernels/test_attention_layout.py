"""How Hopper's attention divides its work, and what it refuses; both are settled before a GPU is asked."""

import pytest
import torch

from kernels.hopper.attention import MOST_SPLIT_PAGES, MOST_SPLITS, SPLIT_PAGES, attention, plan_of, rope_append

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
@pytest.mark.parametrize("tokens", [1, 64, 256, 257, 8192])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_a_launch_fits_the_machine_and_scratch_memory_stays_small(tokens, kv_heads, window):
    plan = plan_of(tokens, kv_heads, 2048, window, 132)
    assert 1 <= plan.blocks <= 3 * 132
    assert plan.owners >= (plan.blocks if plan.whole else tokens * kv_heads)
    assert plan.most == 1 or plan.owners * plan.most * 8 * 66 * 4 < 300e6
    assert plan.whole == (tokens > 256 or window is not None)


def arguments(heads=16, kv_heads=2, dim=64, page=64, dtype=torch.bfloat16, index=torch.int32):
    pool = torch.zeros(3, kv_heads, page, dim, dtype=dtype)
    at = torch.zeros(4, dtype=index)
    q, table, sinks = torch.zeros(4, heads, dim, dtype=dtype), torch.zeros(5, 3, dtype=index), torch.zeros(heads)
    return q, pool, pool, table, at, at, sinks


@pytest.mark.parametrize(
    ("options", "window", "named"),
    [
        ({"dim": 32}, None, "64"), ({"page": 16}, None, "64"), ({"heads": 15}, None, "15 query heads over 2"),
        ({"heads": 34}, None, "34 query heads over 2"), ({"dtype": torch.float16}, None, "bfloat16"),
        ({"index": torch.int64}, None, "int32"), ({}, 0, "window 0"),
    ],
)
def test_attention_refuses_what_its_kernel_cannot_do(options, window, named):
    with pytest.raises(ValueError, match=named):
        attention(*arguments(**options), window)


def test_a_page_table_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="8193 pages"):
        plan_of(1, 8, 8193, None, 132)


def test_rope_append_refuses_rows_that_are_not_whole_heads():
    _, keys, values, table, slots, positions, _ = arguments()
    angles = torch.zeros(64, 32)
    for columns, named in ((20 * 64 + 1, "not a multiple"), (4 * 64, "0 query heads"), (7 * 64, "3 query heads")):
        qkv = torch.zeros(4, columns, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=named):
            rope_append(qkv, angles, angles, positions, slots, table, keys, values)
