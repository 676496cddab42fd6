"""RoPE, append and attention over pages on an H100, against kernels.reference in float32."""

import math
from contextlib import contextmanager

import pytest
import torch

from kernels import reference
from kernels.hopper.attention import attention, rope_append

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
PAGE, DIM = 64, 64
ABSURD = 10**9  # a page id that no pool has
SHAPES = [(64, 8), (32, 4), (8, 1)]  # query and kv heads of both models at tp 1, 2, 8
EDGES = (0, 1, 62, 63, 64, 65, 66, 126, 127, 128, 129, 130, 255, 256, 257, 511, 512, 513, 1000)
TOKENS = (1, 2, 3, 8, 17, 64, 100, 256)


class Batch:
    """Tokens at given positions, each of a request of its own; all that no token sees is NaN or absurd."""

    def __init__(self, positions, heads, kv_heads, width, seed=0):
        draw = torch.Generator(DEVICE).manual_seed(seed)
        count = len(positions)
        used = [position // PAGE + 1 for position in positions]
        shape = (1 + sum(used), kv_heads, PAGE, DIM)
        self.keys = torch.randn(shape, device=DEVICE, generator=draw, dtype=torch.bfloat16)
        self.values = torch.randn(shape, device=DEVICE, generator=draw, dtype=torch.bfloat16)
        self.keys[0] = self.values[0] = math.nan
        self.page_table = torch.full((count + 1, width), ABSURD, dtype=torch.int32, device=DEVICE)
        self.slots = torch.randperm(count + 1, device=DEVICE, generator=draw)[:count].int()
        self.positions = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
        pages = (torch.randperm(sum(used), device=DEVICE, generator=draw) + 1).int().split(used)
        for slot, position, own in zip(self.slots.tolist(), positions, pages, strict=True):
            self.page_table[slot, : len(own)] = own
            self.keys[own[-1], :, position % PAGE + 1 :] = math.nan
            self.values[own[-1], :, position % PAGE + 1 :] = math.nan
        self.q = 2 * torch.randn(count, heads, DIM, device=DEVICE, generator=draw, dtype=torch.bfloat16)
        self.sinks = torch.randn(heads, device=DEVICE, generator=draw)

    def run(self, window, rows=slice(None)):
        with memory_poisoned():
            return attention(*self._arguments(self.q, rows), window)

    def exact(self, window):
        return reference.attention(*self._arguments(self.q.float(), slice(None)), window)

    def _arguments(self, q, rows):
        return q[rows], self.keys, self.values, self.page_table, self.slots[rows], self.positions[rows], self.sinks


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
    return float(((out.float() - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("tokens", [*TOKENS, 2048])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_rope_append_equals_the_reference_byte_for_byte(tokens, heads, kv_heads):
    draw = torch.Generator(DEVICE).manual_seed(tokens)
    slots, width = 3, 16  # 3 * 1024 places
    at = torch.randperm(slots * width * PAGE, device=DEVICE, generator=draw)[:tokens].int()
    where = (at % (width * PAGE), at // (width * PAGE))  # positions, slots
    table = (torch.randperm(slots * width, device=DEVICE, generator=draw) + 1).int().view(slots, width)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * DIM, device=DEVICE, generator=draw, dtype=torch.bfloat16)
    cos, sin = torch.randn(2, width * PAGE, DIM // 2, device=DEVICE, generator=draw)
    pools = torch.randn(2, 1 + slots * width, kv_heads, PAGE, DIM, device=DEVICE, generator=draw, dtype=torch.bfloat16)
    expected_pools = pools.clone()
    expected = reference.rope_append(qkv, cos, sin, *where, table, *expected_pools)
    with memory_poisoned():
        q = rope_append(qkv, cos, sin, *where, table, *pools)
    assert torch.equal(q, expected)
    assert torch.equal(pools, expected_pools)


def test_spare_rows_append_to_the_scratch_page_only():
    table = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    spare = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    pools = torch.randn(2, 5, 8, PAGE, DIM, device=DEVICE).bfloat16()
    before = pools.clone()
    qkv, angles = torch.randn(64, 80 * DIM, device=DEVICE).bfloat16(), torch.randn(256, DIM // 2, device=DEVICE)
    rope_append(qkv, angles, angles, spare, spare, table, *pools)
    assert torch.equal(pools[:, 1:], before[:, 1:])
    assert torch.equal(pools[:, 0, :, 1:], before[:, 0, :, 1:])


@pytest.mark.parametrize("window", [None, 128, 1, 64, 200, 700])
@pytest.mark.parametrize(("heads", "kv_heads"), [*SHAPES, (16, 4), (16, 1), (2, 2), (9, 3)])
def test_attention_at_the_edges_of_pages_splits_and_windows(heads, kv_heads, window):
    batch = Batch(EDGES, heads, kv_heads, width=20)
    assert worst_error(batch.run(window), batch.exact(window)) < 1e-2


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_attention_of_a_mixed_batch(heads, kv_heads, tokens, window):
    batch = Batch([(n * 331 + tokens) % 1200 for n in range(tokens)], heads, kv_heads, width=2048, seed=tokens)
    assert worst_error(batch.run(window), batch.exact(window)) < 1e-2


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("position", [8191, 16383, 16384, 40000, 131071])
def test_attention_of_long_contexts(position, window):
    batch = Batch([position, 70], 8, 1, width=2048)
    assert worst_error(batch.run(window), batch.exact(window)) < 1e-2


@pytest.mark.parametrize("window", [None, 128])
def test_attention_of_a_prefill_of_2048_tokens_of_two_requests(window):
    batch = Batch([1499, 547], 64, 8, width=32)
    batch.slots = batch.slots.repeat_interleave(torch.tensor([1500, 548], device=DEVICE))
    batch.positions = torch.cat([torch.arange(1500), torch.arange(548)]).int().to(DEVICE)
    batch.q = torch.randn(2048, 64, DIM, device=DEVICE).bfloat16()
    assert worst_error(batch.run(window), batch.exact(window)) < 1e-2


@pytest.mark.parametrize("window", [None, 128, 700])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_a_tokens_bytes_are_the_same_alone_and_among_others(heads, kv_heads, window):
    positions = [*EDGES, 5000] + [(n * 331) % 1200 for n in range(280)]  # 300: blocks take tokens whole
    batch = Batch(positions, heads, kv_heads, width=100)
    together = batch.run(window)
    for first, count in ((0, 1), (0, 20), (3, 1), (15, 2), (18, 1), (19, 1), (7, 64), (40, 256), (17, 100)):
        rows = slice(first, first + count)
        assert torch.equal(batch.run(window, rows), together[rows]), (first, count)


def test_replays_of_a_graph_repeat_their_bytes_and_follow_their_inputs():
    batch = Batch([*EDGES, 20000], 64, 8, width=400)
    first = batch.run(None)  # outside the capture: allocates the counters
    arguments = (batch.q, batch.keys, batch.values, batch.page_table, batch.slots, batch.positions, batch.sinks, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [attention(*arguments) for _ in range(3)]  # each starts while the one before it ends
    for _ in range(3):
        for out in outs:
            out.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(out, first) for out in outs)
    batch.q.mul_(-0.5)
    batch.positions.sub_(1).clamp_(min=0)
    graph.replay()
    assert torch.equal(outs[-1], batch.run(None))
