"""RoPE, append and attention over pages on an H100, against kernels.reference in float32."""

import functools
import math
from contextlib import contextmanager

import pytest
import torch

from kernels import reference
from kernels.hopper.attention import decode_attention, prefill_attention
from kernels.ops import AttentionParameters, KvPages, Rope, TokenPlaces

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
PAGE, DIM = 64, 64
ABSURD = 10**9  # a page id that no pool has
MOST_POSITIONS = 2**17
SHAPES = [(64, 8), (32, 4), (8, 1)]  # query and kv heads of both models at tp 1, 2, 8
OTHER_SHAPES = [(16, 4), (16, 1), (2, 2), (9, 3), (9, 1)]
EDGES = (0, 1, 62, 63, 64, 65, 66, 126, 127, 128, 129, 130, 255, 256, 257, 511, 512, 513, 1000)
TOKENS = (1, 2, 3, 8, 17, 64, 100, 256)


@functools.cache
def rope():
    """cos and sin of angles that no two positions share."""
    angles = torch.rand(MOST_POSITIONS, DIM // 2, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(9))
    return Rope((6.28 * angles).cos(), (6.28 * angles).sin())


class Chunks:
    """Packed tokens: of each request `count` from position `start`. All that no token sees is NaN or absurd."""

    def __init__(self, chunks, heads, kv_heads, width, seed=0, spare=0):
        draw = torch.Generator(DEVICE).manual_seed(seed)
        counts = torch.tensor([count for _, count in chunks], device=DEVICE)
        used = [(start + count - 1) // PAGE + 1 for start, count in chunks]
        shape = (2, 1 + sum(used), kv_heads, PAGE, DIM)
        self.pools = torch.randn(shape, device=DEVICE, generator=draw, dtype=torch.bfloat16)
        self.pools[:, 0] = math.nan
        self.page_table = torch.full((len(chunks) + 1, width), ABSURD, dtype=torch.int32, device=DEVICE)
        order = torch.randperm(len(chunks) + 1, device=DEVICE, generator=draw).int()
        self.slots, spare_slot = order[:-1].repeat_interleave(counts), order[-1:]
        self.page_table[spare_slot.long()] = 0
        positions = [torch.arange(start, start + count) for start, count in chunks]
        self.positions = torch.cat(positions).int().to(DEVICE)
        pages = (torch.randperm(sum(used), device=DEVICE, generator=draw) + 1).int().split(used)
        for slot, (start, _), own in zip(order.tolist(), chunks, pages, strict=False):
            self.page_table[slot, : len(own)] = own
            self.pools[:, own[start // PAGE].item(), :, start % PAGE :] = math.nan  # the tokens' own are not there yet
            self.pools[:, own[start // PAGE + 1 :].long()] = math.nan
        columns = (heads + 2 * kv_heads) * DIM
        self.real = len(self.positions)
        self.positions = torch.cat((self.positions, torch.zeros(spare, dtype=torch.int32, device=DEVICE)))
        self.slots = torch.cat((self.slots, spare_slot.repeat(spare)))
        self.qkv = torch.randn(self.real + spare, columns, device=DEVICE, generator=draw, dtype=torch.bfloat16)
        self.qkv[:, : heads * DIM] *= 2
        self.sinks = torch.randn(heads, device=DEVICE, generator=draw)
        torch.cuda.synchronize()  # positions and slots are read before the kernels' wait

    def run(self, attention, window, rows=slice(None), pools=None):
        """The rows' outputs; pools: written in place, else a copy is."""
        pools = self.pools.clone() if pools is None else pools
        at, slots = self.positions[rows].clone(), self.slots[rows].clone()
        torch.cuda.synchronize()
        with memory_poisoned():
            return attention(
                self.qkv[rows],
                TokenPlaces(at, slots),
                rope(),
                KvPages(*pools, self.page_table),
                AttentionParameters(self.sinks, window),
            )

    def exact(self, window):
        """The outputs in float32, and the pools afterwards."""
        pools, real = self.pools.clone(), slice(self.real)
        at, slots = self.positions[real], self.slots[real]
        q = reference.rope_append(self.qkv[real], *rope(), at, slots, self.page_table, *pools)
        return reference.attention(q.float(), *pools, self.page_table, slots, at, self.sinks, window), pools

    def check(self, attention, window):
        pools = self.pools.clone()
        expected, expected_pools = self.exact(window)
        assert worst_error(self.run(attention, window, pools=pools)[: self.real], expected) < 1e-2
        assert same_bytes(pools[:, 1:], expected_pools[:, 1:])  # page 0 takes what spare rows write


def rows_at(positions, heads, kv_heads, width, seed=0, spare=0):
    """Decode: tokens at given positions, each of a request of its own."""
    return Chunks([(position, 1) for position in positions], heads, kv_heads, width, seed, spare)


@contextmanager
def memory_poisoned():
    """torch.empty fills with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def worst_error(out, expected):
    """Of all tokens."""
    return float(((out.float() - expected).norm(dim=1) / expected.norm(dim=1)).nan_to_num(math.inf).max())


def same_bytes(one, other):
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("attention", [decode_attention, prefill_attention])
def test_spare_rows_append_to_the_scratch_page_only(attention):
    table = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    spare = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    pools = torch.randn(2, 5, 8, PAGE, DIM, device=DEVICE).bfloat16()
    before = pools.clone()
    qkv, sinks = torch.randn(64, 80 * DIM, device=DEVICE).bfloat16(), torch.zeros(64, device=DEVICE)
    torch.cuda.synchronize()
    places, pages = TokenPlaces(spare, spare), KvPages(*pools, table)
    attention(qkv, places, rope(), pages, AttentionParameters(sinks, None))
    assert torch.equal(pools[:, 1:], before[:, 1:])
    assert torch.equal(pools[:, 0, :, 1:], before[:, 0, :, 1:])


@pytest.mark.parametrize("window", [None, 128, 1, 64, 200, 700])
@pytest.mark.parametrize(("heads", "kv_heads"), [*SHAPES, *OTHER_SHAPES])
def test_decode_at_the_edges_of_pages_splits_and_windows(heads, kv_heads, window):
    rows_at(EDGES, heads, kv_heads, width=20).check(decode_attention, window)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_decode_of_a_mixed_batch(heads, kv_heads, tokens, window):
    positions = [(n * 331 + tokens) % 1200 for n in range(tokens)]
    rows_at(positions, heads, kv_heads, width=2048, seed=tokens).check(decode_attention, window)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("position", [8191, 16383, 16384, 40000, 131071])
def test_decode_of_long_contexts(position, window):
    rows_at([position, 70], 8, 1, width=2048).check(decode_attention, window)
    rows_at([position], 8, 1, width=2048).check(decode_attention, window)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_decode_at_the_longest_context(heads, kv_heads, window):
    rows_at([131071, 64, 9000], heads, kv_heads, width=2048).check(decode_attention, window)


@pytest.mark.parametrize("window", [None, 128])
def test_decode_with_spare_rows(window):
    rows_at([5, 700, 64], 64, 8, width=2048, spare=5).check(decode_attention, window)


@pytest.mark.parametrize("window", [None, 128, 700])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_a_decoded_tokens_bytes_are_the_same_alone_and_among_others(heads, kv_heads, window):
    positions = [*EDGES, 5000] + [(n * 331) % 1200 for n in range(236)]  # 256
    batch = rows_at(positions, heads, kv_heads, width=100)
    together = batch.run(decode_attention, window)
    for first, count in ((0, 1), (0, 20), (3, 1), (15, 2), (18, 1), (19, 1), (7, 64), (40, 216), (17, 100)):
        rows = slice(first, first + count)
        assert torch.equal(batch.run(decode_attention, window, rows), together[rows]), (first, count)


@pytest.mark.parametrize("window", [None, 128])
def test_replays_of_a_decode_graph_repeat_their_bytes_and_follow_their_inputs(window):
    batch = rows_at([*EDGES, 20000], 64, 8, width=400)
    first = batch.run(decode_attention, window)  # outside the capture: allocates the counters
    check_replays(batch, decode_attention, window, first)


@pytest.mark.parametrize("window", [None, 128])
def test_replays_of_a_prefill_graph_repeat_their_bytes_and_follow_their_inputs(window):
    batch = Chunks([(0, 300), (77, 41)], 64, 8, width=16)
    check_replays(batch, prefill_attention, window, batch.run(prefill_attention, window))


def check_replays(batch, attention, window, first):
    pools = batch.pools.clone()
    places, pages = TokenPlaces(batch.positions, batch.slots), KvPages(*pools, batch.page_table)
    arguments = (batch.qkv, places, rope(), pages, AttentionParameters(batch.sinks, window))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [attention(*arguments) for _ in range(3)]  # each starts while the one before it ends
    for _ in range(3):
        for out in outs:
            out.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(out, first) for out in outs)
    batch.qkv.mul_(-0.5)
    graph.replay()
    assert torch.equal(outs[-1], batch.run(attention, window))
    assert not torch.equal(outs[-1], first)


@pytest.mark.parametrize("window", [None, 128, 1, 65])
@pytest.mark.parametrize(("heads", "kv_heads"), [*SHAPES, *OTHER_SHAPES])
def test_prefill_of_packed_requests(heads, kv_heads, window):
    chunks = [(0, 1), (0, 130), (64, 64), (200, 5), (63, 2), (1000, 77), (5, 3), (127, 1), (0, 64), (128, 190)]
    Chunks(chunks, heads, kv_heads, width=20, spare=30).check(prefill_attention, window)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("chunks", [[(0, 2048)], [(0, 1500), (0, 548)], [(9000, 128)], [(0, 3)]])
def test_prefill_of_long_prompts(chunks, window):
    Chunks(chunks, 64, 8, width=256).check(prefill_attention, window)


@pytest.mark.parametrize("window", [None, 128])
def test_prefill_of_a_late_chunk_of_a_long_context(window):
    Chunks([(130900, 172), (70, 9)], 8, 1, width=2048).check(prefill_attention, window)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("sizes", [(64,), (300,), (100, 7, 1, 250, 33)])
def test_a_prompts_bytes_do_not_depend_on_its_chunks(heads, kv_heads, sizes, window):
    batch = Chunks([(0, 1024)], heads, kv_heads, width=16)
    whole_pools, pools = batch.pools.clone(), batch.pools.clone()
    whole = batch.run(prefill_attention, window, pools=whole_pools)
    chunks, begin = [], 0
    while begin < 1024:
        rows = slice(begin, begin + sizes[len(chunks) % len(sizes)])
        chunks.append(batch.run(prefill_attention, window, rows, pools))
        begin = rows.stop
    assert torch.equal(torch.cat(chunks), whole)
    assert torch.equal(pools.view(torch.int16), whole_pools.view(torch.int16))  # NaN where nothing was written


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_a_prompts_bytes_do_not_depend_on_its_neighbours(heads, kv_heads, window):
    counts = (5, 300, 17, 1, 64, 9)
    batch = Chunks([(13 * n, count) for n, count in enumerate(counts)], heads, kv_heads, width=16, spare=11)
    together, begin = batch.run(prefill_attention, window), 0
    for count in counts:
        rows = slice(begin, begin + count)
        assert torch.equal(batch.run(prefill_attention, window, rows), together[rows])
        begin += count


def test_what_one_request_holds_does_not_reach_its_neighbours():
    batch = Chunks([(0, 10), (0, 10), (0, 10)], 64, 8, width=4)
    before = batch.run(prefill_attention, None)
    batch.qkv[10:20] = math.nan
    after = batch.run(prefill_attention, None)
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[20:], after[20:])
