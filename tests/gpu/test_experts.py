"""The mixture of experts on a GPU against the reference in float32, and each token's bytes against its neighbours."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from kernels import hopper, reference
from kernels.hopper import experts as packed_experts
from kernels.hopper.experts import STREAM_LARGE, STREAM_SMALL, decode_experts, group
from kernels.ops import Routing

pytestmark = pytest.mark.gpu
HIDDEN, LIMIT, TOP_K = 2880, 7.0, 4
TOKENS = (1, 2, 3, 8, 17, 64, 100, 256)
SHAPES = {  # experts, hidden, intermediate of a rank, experts a token
    "20b": (32, HIDDEN, 2880, 4),
    "20b tp 2": (32, HIDDEN, 1440, 4),
    "20b tp 4": (32, HIDDEN, 736, 4),
    "20b tp 8": (32, HIDDEN, 384, 4),
    "120b": (128, HIDDEN, 2880, 4),
    "120b tp 8": (128, HIDDEN, 384, 4),
    "even": (8, 256, 256, 2),
    "half tiles": (5, 96, 160, 3),
}


class Layer:
    def __init__(self, experts, hidden, inner, top_k):
        self.draw = torch.Generator("cuda").manual_seed(experts * hidden + inner)
        self.experts, self.hidden, self.top_k = experts, hidden, top_k
        self.gate_up, self.down = self.matrix(2 * inner, hidden), self.matrix(hidden, inner)
        self.packed = (
            hopper.pack_experts(*self.gate_up, interleaved=True),
            hopper.pack_experts(*self.down, interleaved=False),
        )

    def matrix(self, rows, columns):
        """Entries of about 1 / 50, so that gates cross the limit now and then."""
        shape, options = (self.experts, rows, columns // 32), {"dtype": torch.uint8, "device": "cuda"}
        return (
            torch.randint(0, 256, (*shape, 16), generator=self.draw, **options),
            torch.randint(117, 123, shape, generator=self.draw, **options),
            torch.randn(shape[:2], generator=self.draw, device="cuda").bfloat16(),
        )

    def tokens(self, count):
        x = torch.randn(count, self.hidden, generator=self.draw, device="cuda").bfloat16()
        order = torch.rand(count, self.experts, generator=self.draw, device="cuda").argsort(dim=-1)
        weights = torch.randn(count, self.top_k, generator=self.draw, device="cuda").softmax(-1)
        return x, order[:, : self.top_k], weights  # the ids are not contiguous, as the reference's are not

    def run(self, x, ids, weights):
        """[T, K, H], not summed."""
        with uninitialised_is_nan():
            return decode_experts(x, Routing(ids, weights), *self.packed, LIMIT)

    def exact(self, x, ids, weights):
        gate_up, down = ((blocks, scales, bias.float()) for blocks, scales, bias in (self.gate_up, self.down))
        return reference.experts(x.float(), ids, weights, gate_up, down, LIMIT).sum(1)


@contextmanager
def uninitialised_is_nan():
    """torch.empty gives NaN, or the largest integer: scratch and output are poisoned."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def distance(out, exact):
    """Relative, of the sum over choices."""
    return float((out.float().sum(1) - exact).norm() / exact.norm())


@pytest.fixture(scope="module", params=SHAPES)
def layer(request):
    yield Layer(*SHAPES[request.param])
    torch.cuda.empty_cache()


@pytest.mark.parametrize("count", TOKENS)
def test_close_to_float32(layer, count):
    tokens = layer.tokens(count)
    assert distance(layer.run(*tokens), layer.exact(*tokens)) < 5e-3


def test_a_token_is_the_same_bytes_alone_and_among_others(layer):
    x, ids, weights = layer.tokens(300)
    together = layer.run(x, ids, weights)
    for first, count in ((0, 1), (7, 1), (255, 2), (31, 8), (100, 17), (3, 64), (20, 65), (0, 128), (44, 256)):
        rows = slice(first, first + count)
        assert torch.equal(layer.run(x[rows], ids[rows], weights[rows]), together[rows]), (first, count)


@pytest.mark.parametrize("count", [8, 40, 64, 65, 200])
def test_every_token_may_choose_the_same_experts(layer, count):
    x, ids, weights = layer.tokens(count)
    ids = ids[:1].expand(count, -1)
    assert distance(layer.run(x, ids, weights), layer.exact(x, ids, weights)) < 5e-3
    assert torch.equal(layer.run(x[-1:], ids[-1:], weights[-1:]), layer.run(x, ids, weights)[-1:])


@pytest.mark.parametrize("alike", [False, True], ids=["random choices", "the same experts"])
@pytest.mark.parametrize("count", [65, 96, 97, 145, 256])
def test_how_many_rows_are_cut_in_tiles_changes_no_bytes(layer, count, alike):
    x, ids, weights = layer.tokens(count)
    ids = ids[:1].expand(count, -1) if alike else ids
    outs = []
    for geometry in (STREAM_SMALL, STREAM_LARGE):
        with patch.object(packed_experts, "stream_geometry", lambda pairs, experts, geometry=geometry: geometry):
            outs.append(layer.run(x, ids, weights))
    assert torch.equal(*outs)
    for first in range(0, count, 50):
        rows = slice(first, first + 50)  # by the kernels for fewer
        assert torch.equal(layer.run(x[rows], ids[rows], weights[rows]), outs[0][rows]), first


@pytest.mark.parametrize("count", [9, 33, 64])
def test_an_expert_may_have_more_pairs_than_a_block_takes_at_once(layer, count):
    """And other experts few, before it and behind it in the list of work."""
    x, ids, weights = layer.tokens(count)
    ids = ids.clone()
    common = layer.experts // 2
    ids[:, 0] = torch.where((ids == common).any(1), ids[:, 0], common)
    assert distance(layer.run(x, ids, weights), layer.exact(x, ids, weights)) < 5e-3
    for token in (0, count // 2, count - 1):
        rows = slice(token, token + 1)
        assert torch.equal(layer.run(x[rows], ids[rows], weights[rows]), layer.run(x, ids, weights)[rows])


@pytest.mark.parametrize("count", [1, 8, 40, 64, 200])
def test_a_graph_replays_the_eager_bytes_for_new_inputs(count):
    layer = Layer(*SHAPES["even"])
    inputs = [(a, b.contiguous(), c) for a, b, c in (layer.tokens(count) for _ in range(3))]
    x, ids, weights = (torch.empty_like(value) for value in inputs[0])
    layer.run(*inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = []
        for a, b, c in inputs:  # one after the other: nothing may start too early
            decode_experts(a, Routing(b, c), *layer.packed, LIMIT)  # its scratch and result are taken again at once
            for to, value in zip((x, ids, weights), (a, b, c), strict=True):
                to.copy_(value)  # new ids right before the kernels that read them early
            outs.append(decode_experts(x, Routing(ids, weights), *layer.packed, LIMIT))
            outs.append(decode_experts(outs[-1][:, 0].contiguous(), Routing(ids, weights), *layer.packed, LIMIT))
    for _ in range(3):
        for values in inputs:
            for old, new in zip(values, layer.tokens(count), strict=True):
                old.copy_(new)
        graph.replay()
        for n, (a, b, c) in enumerate(inputs):
            first = layer.run(a, b, c)
            assert torch.equal(outs[2 * n], first)
            assert torch.equal(outs[2 * n + 1], layer.run(first[:, 0], b, c))


@pytest.mark.parametrize("tile_pairs", [32, 48, 144])
@pytest.mark.parametrize(("count", "experts"), [(1, 32), (65, 32), (300, 8), (2048, 128)])
def test_pairs_are_grouped_by_expert_in_few_even_tiles(count, experts, tile_pairs):
    draw = torch.Generator("cuda").manual_seed(count)
    ids = torch.rand(count, experts, generator=draw, device="cuda").argsort(-1)[:, :TOP_K]
    with uninitialised_is_nan():
        order, tiles = group(ids, experts, tile_pairs)
    assert torch.equal(order.long(), ids.flatten().argsort(stable=True))
    expected, first = [], 0
    for expert, load in enumerate(ids.flatten().bincount(minlength=experts).tolist()):
        count_of_tiles, at = -(-load // tile_pairs), 0
        for left in range(count_of_tiles, 0, -1):  # each an even share of what is left, in units of 16
            size = min(-(-(load - at) // (16 * left)) * 16, load - at)
            expected.append([expert, first + at, size])
            at += size
        first += load
    live = [[*tile, len(expected)] for tile in expected]
    assert tiles.tolist() == live + [[0, 0, 0, 0]] * (len(tiles) - len(live))


def test_a_nan_in_one_token_stays_there():
    layer = Layer(*SHAPES["even"])
    for count in (8, 40, 100):
        x, ids, weights = layer.tokens(count)
        clean = layer.run(x, ids, weights)
        x[3] = torch.nan
        dirty = layer.run(x, ids, weights)
        assert dirty[3].isnan().all()
        dirty[3] = clean[3]
        assert torch.equal(dirty, clean)


@pytest.mark.parametrize("scale", [100, 110, 126, 140])
def test_every_code_and_scale_is_exact(scale):
    """One-hot activations read single weights back: exact in bf16, so that subnormals may not be flushed."""
    hidden, inner = 64, 64
    code = torch.arange(hidden * inner, device="cuda").view(hidden, inner) % 16
    blocks = (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8).view(1, hidden, inner // 32, 16)
    blocks = blocks.roll(3, dims=-1)
    scales = torch.full((1, hidden, inner // 32), scale, dtype=torch.uint8, device="cuda")
    none = torch.zeros(1, hidden, dtype=torch.bfloat16, device="cuda")
    down = hopper.pack_experts(blocks, scales, none, interleaved=False)
    # Gate and up rows are all zero but for the bias: gate 7, up -1 (no output) but for one unit, up 0.
    zeros = torch.zeros(1, 2 * inner, hidden // 32, 16, dtype=torch.uint8, device="cuda")
    neutral = torch.full((1, 2 * inner, hidden // 32), 127, dtype=torch.uint8, device="cuda")
    ids, one = torch.zeros(1, 1, dtype=torch.int64, device="cuda"), torch.ones(1, 1, device="cuda")
    x = torch.zeros(1, hidden, dtype=torch.bfloat16, device="cuda")
    dense = reference.dequantize(blocks, scales, torch.float32)[0]
    for unit in (0, 1, 31, 63):
        bias = torch.tensor([7.0, -1.0], device="cuda").repeat(inner).view(1, inner, 2)
        bias[0, unit, 1] = 0.0
        gate_up = hopper.pack_experts(zeros, neutral, bias.flatten(1).bfloat16(), interleaved=True)
        out = decode_experts(x, Routing(ids, one), gate_up, down, LIMIT)
        h = reference.swiglu(torch.tensor(7.0), torch.tensor(0.0), LIMIT).bfloat16().float().item()
        assert h == 7.0
        assert torch.equal(out[0, 0].float(), (dense[:, unit] * h).bfloat16().float())
