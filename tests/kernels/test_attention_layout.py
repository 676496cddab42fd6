"""How Hopper's attention divides its work and lays out its operands, by the kernels' own index functions; and what it
refuses before a GPU is asked."""

import ctypes

import pytest
import torch

from kernels.hopper.attention import (
    CONSUMERS,
    MOST_SPLIT_PAGES,
    MOST_SPLITS,
    WARPS,
    decode_attention,
    decode_defines,
    plan_of,
    prefill_attention,
    warpgroup_tokens,
)
from kernels.ops import AttentionParameters, KvPages, Rope, TokenPlaces
from tests.kernels.host import compile_for_host

PAGE, DIM = 64, 64
CODE = """
#include "attention/layout.cuh"
#include "attention/splits.cuh"

extern "C" int splits(int position, int window) { return Keys(position, window).splits; }
// first key, last key, first page, pages, splits
extern "C" void keys(int position, int window, int* out) {
    const Keys seen(position, window);
    out[0] = seen.first, out[1] = seen.last, out[2] = seen.first_page, out[3] = seen.pages, out[4] = seen.splits;
}
extern "C" int first_of(int position, int window, int split, int warp) {
    return Keys(position, window).first_of(split, warp);
}
extern "C" int count_of(int position, int window, int split, int warp) {
    return Keys(position, window).count_of(split, warp);
}
extern "C" int swizzled_(int row, int chunk) { return swizzled(row, chunk); }
extern "C" int key_matrix_(int n, int half, int lane) { return key_matrix(n, half, lane); }
extern "C" int value_matrix_(int k, int pair, int lane) { return value_matrix(k, pair, lane); }
extern "C" int query_matrix_(int warp, int k, int lane) { return query_matrix(warp, k, lane); }
extern "C" int accumulator_row_(int warp, int lane, int r) { return accumulator_row(warp, lane, r); }
extern "C" unsigned long long key_operand(unsigned address, int step) {
    return page_operand(address) + SIXTEEN_DIMENSIONS * step;
}
extern "C" unsigned long long value_operand(unsigned address, int step) {
    return page_operand(address) + SIXTEEN_KEYS * step;
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = compile_for_host(CODE, decode_defines(8, PAGE), tmp_path_factory.mktemp("host"))
    library.key_operand.restype = library.value_operand.restype = ctypes.c_ulonglong
    return library


@pytest.mark.parametrize("window", [2**31 - 1, 1, 64, 65, 128, 130, 700])
@pytest.mark.parametrize("position", [0, 1, 63, 64, 127, 128, 255, 256, 257, 1000, 16383, 16384, 40000, 131071])
def test_the_warps_of_a_tokens_splits_take_each_page_that_it_sees_once(host, position, window):
    out = (ctypes.c_int * 5)()
    host.keys(position, window, out)
    first, last, first_page, pages, splits = out
    assert (first, last) == (max(position - window + 1, 0), position)
    assert (first_page, first_page + pages - 1) == (first // PAGE, last // PAGE)
    assert 1 <= splits <= MOST_SPLITS
    taken = []
    for split in range(splits):
        for warp in range(WARPS):
            begin = host.first_of(position, window, split, warp)
            count = host.count_of(position, window, split, warp)
            assert 0 <= count <= 32  # a lane for each page table entry
            taken += [begin + WARPS * n for n in range(count)]
        assert taken  # no split without a page
    assert sorted(taken) == list(range(pages))


@pytest.mark.parametrize("window", [None, 1, 2, 64, 65, 128, 192, 193, 194, 700, 10**6])
@pytest.mark.parametrize("width", [1, 3, 4, 5, 16, 255, 256, 257, 2048])
def test_scratch_memory_has_room_for_the_splits_of_every_position(host, width, window):
    plan = plan_of(8, 8, width, PAGE, window, 132)
    positions = range(0, width * PAGE, 7 if width > 16 else 1)
    most = max(host.splits(position, window or 2**31 - 1) for position in positions)
    assert most <= plan.most_splits <= most + 1


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("tokens", [1, 64, 256])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_a_launch_fits_the_machine_and_scratch_memory_stays_small(tokens, kv_heads, window):
    plan = plan_of(tokens, kv_heads, 2048, PAGE, window, 132)
    assert 1 <= plan.blocks <= 3 * 132
    assert plan.most_splits == 1 or tokens * kv_heads * plan.most_splits * 8 * 66 * 4 < 300e6
    assert (plan.most_splits == 1) == (window is not None)


def test_a_page_table_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="8193 pages"):
        plan_of(1, 8, MOST_SPLITS * MOST_SPLIT_PAGES + 1, PAGE, None, 132)


def arguments(columns=20 * 64, dim=64, page=64, dtype=torch.bfloat16, index=torch.int32, tokens=4, window=None):
    pool = torch.zeros(3, 2, page, dim, dtype=dtype)
    qkv, angles = torch.zeros(tokens, columns, dtype=torch.bfloat16), torch.zeros(64, 32)
    at, table = torch.zeros(tokens, dtype=index), torch.zeros(5, 3, dtype=index)
    return (
        qkv,
        TokenPlaces(at, at),
        Rope(angles, angles),
        KvPages(pool, pool, table),
        AttentionParameters(torch.zeros(16), window),
    )


@pytest.mark.parametrize("attention", [decode_attention, prefill_attention])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dim": 32}, "64"),
        ({"page": 16}, "64"),
        ({"columns": 19 * 64}, "15 query heads over 2"),
        ({"columns": 38 * 64}, "34 query heads over 2"),
        ({"columns": 4 * 64}, "0 query heads"),
        ({"columns": 20 * 64 + 1}, "not a multiple"),
        ({"dtype": torch.float16}, "bfloat16"),
        ({"index": torch.int64}, "int32"),
        ({"window": 0}, "window 0"),
    ],
)
def test_attention_refuses_what_its_kernels_cannot_do(attention, options, named):
    with pytest.raises(ValueError, match=named):
        attention(*arguments(**options))


def test_decode_refuses_more_tokens_than_its_search_holds():
    with pytest.raises(ValueError, match="257 tokens"):
        decode_attention(*arguments(tokens=257))


@pytest.mark.parametrize("group", range(1, 17))
def test_the_rows_of_a_prefill_tile_name_each_of_its_tokens_and_heads_once(host, group):
    tokens = warpgroup_tokens(group)
    assert CONSUMERS * tokens <= 32
    rows = []
    for warp in range(4):
        for lane in range(0, 32, 4):  # the four lanes of a row hold its columns
            rows += [host.accumulator_row_(warp, lane, r) for r in range(2)]
    assert sorted(rows) == list(range(64))
    used = [(row // group, row % group) for row in rows if row < tokens * group]
    assert sorted(used) == [(token, head) for token in range(tokens) for head in range(group)]


@pytest.fixture(scope="module")
def page():
    return torch.arange(PAGE * DIM).view(PAGE, DIM)


@pytest.fixture(scope="module")
def shared(host, page):
    """The page as both kernels copy it to shared memory, in elements of 2 bytes."""
    memory = torch.full((PAGE * DIM,), -1)
    for row in range(PAGE):
        for chunk in range(DIM // 8):
            at = host.swizzled_(row, chunk) // 2
            memory[at : at + 8] = page[row, chunk * 8 : chunk * 8 + 8]
    return memory


def test_ldmatrix_finds_mmas_fragments_in_a_page(host, page, shared):
    """By the PTX ISA: lane 8 i + r names row r of matrix i, and two matrices are one step of k for n of eight."""

    def row_named(at):
        assert at % 16 == 0
        return shared[at // 2 : at // 2 + 8]

    for lane in range(32):
        matrix, row = lane // 8, lane % 8
        for n in range(8):
            for half in range(2):  # k: dimensions, n: keys; matrices 0 and 1, 2 and 3 are 16 dimensions each
                dims = slice(32 * half + 8 * matrix, 32 * half + 8 * matrix + 8)
                assert torch.equal(row_named(host.key_matrix_(n, half, lane)), page[8 * n + row, dims])
        for k in range(4):
            for pair in range(4):  # k: keys, n: dimensions, transposed; matrices 0 and 1, 2 and 3 are 16 keys each
                dims = slice(16 * pair + matrix // 2 * 8, 16 * pair + matrix // 2 * 8 + 8)
                key = 16 * k + matrix % 2 * 8 + row
                assert torch.equal(row_named(host.value_matrix_(k, pair, lane)), page[key, dims])


def test_ldmatrix_finds_wgmmas_a_fragments_in_the_queries(host, page, shared):
    """Queries lie like a page. By the PTX ISA a lane's registers are row l / 4, the same 8 rows on, and both 8 columns
    on; ldmatrix gives lane l of its i-th matrix, named by lanes 8 i to 8 i + 7, elements 2 (l % 4) and the next of row
    l / 4."""
    for warp in range(4):
        for k in range(4):
            for lane in range(32):
                matrix, row = lane // 8, 16 * warp + lane // 8 % 2 * 8 + lane % 8
                at = host.query_matrix_(warp, k, lane) // 2
                columns = slice(16 * k + matrix // 2 * 8, 16 * k + matrix // 2 * 8 + 8)
                assert torch.equal(shared[at : at + 8], page[row, columns])
                assert host.accumulator_row_(warp, lane, 0) == 16 * warp + lane // 4


def test_eight_rows_that_ldmatrix_reads_at_once_lie_in_distinct_banks(host):
    for matrix in range(4):
        keys = {host.key_matrix_(0, 0, 8 * matrix + row) % 128 for row in range(8)}
        values = {host.value_matrix_(0, 0, 8 * matrix + row) % 128 for row in range(8)}
        assert len(keys) == len(values) == 8


def test_wgmmas_descriptors_name_the_keys_and_values_of_a_page(host, page, shared):
    """The canonical layouts of the PTX ISA for swizzles of 128 bytes, walked from the kernel's descriptors."""
    base = 5 * 1024  # any place that the swizzle's pattern begins at

    def fields(descriptor):
        assert descriptor >> 62 == 1  # the swizzle
        return (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4  # start, bytes from eight rows to the next

    def at(byte):  # the hardware's swizzle: address bits 4-6 by bits 7-9
        return shared[((byte ^ (byte >> 7 & 7) << 4) - base) // 2]

    n, k = torch.meshgrid(torch.arange(64), torch.arange(16), indexing="ij")
    for step in range(4):
        start, stride = fields(host.key_operand(base, step))
        keys = at(start + n // 8 * stride + n % 8 * 128 + k * 2)  # K-major: n are keys, k dimensions
        assert torch.equal(keys, page[:, 16 * step : 16 * step + 16])
        start, stride = fields(host.value_operand(base, step))
        values = at(start + k // 8 * stride + k % 8 * 128 + n * 2)  # MN-major: n are dimensions, k keys
        assert torch.equal(values, page[16 * step : 16 * step + 16].T)
