"""The products of a prefill step on a Hopper GPU: against the reference in float32, and byte for byte."""

from unittest.mock import patch

import pytest
import torch

from kernels import reference
from kernels.hopper import experts
from kernels.hopper.experts import STREAM_LARGE, STREAM_SMALL, prefill_experts
from kernels.hopper.linear import pack, prefill
from kernels.hopper.linear.prefill import GEOMETRIES, prefill_linear
from kernels.ops import Routing
from tests.gpu.test_experts import LIMIT, SHAPES, Layer, distance, uninitialised_is_nan

pytestmark = pytest.mark.gpu

PROJECTIONS = [(5120, 2880), (2560, 2880), (640, 2880), (2880, 4096), (2880, 2048), (2880, 512)]  # at tp 1, 2, 8
DENSE = [*PROJECTIONS, (8, 32), (24, 96), (1000, 160)]
TOKENS = [1, 31, 64, 65, 100, 128, 129, 300, 512, 513, 1024, 2048]
DENSE_EDGES = [1, 63, 64, 65, 127, 128, 129, 159, 161, 192, 193, 224, 225, 255, 256, 257, 448, 513, 8192]
TILE_EDGES = [15, 16, 17, 31, 32, 33, 47, 48, 49, 143, 144, 145, 287, 288, 289, 8192]  # of tiles of 32, 48, 144 tokens
KERNELS = {"stream, small tiles": STREAM_SMALL, "stream, large tiles": STREAM_LARGE, "prefill": None}  # by geometry


def random(*shape, seed=0, scale=1.0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=draw, device="cuda") * scale).bfloat16()


def packed_layer(rows, columns):
    """The weight, and its packed forms with a bias and without."""
    weight = random(rows, columns, seed=1, scale=columns**-0.5)
    return weight, pack(weight, random(rows, seed=2)), pack(weight)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("rows", "columns"), DENSE)
def test_a_dense_layer_is_the_reference(tokens, rows, columns):
    weight, biased, plain = packed_layer(rows, columns)
    x = random(tokens, columns)
    for packed in (biased, plain):
        with uninitialised_is_nan():
            out = prefill_linear(x, packed)
        assert out.shape == (tokens, rows)
        bias = None if packed.bias is None else packed.bias.float()
        expected = reference.linear(x.float(), weight.float(), bias)
        assert (out.float() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize(("rows", "columns"), [(5120, 2880), (2880, 512), (24, 96)])
def test_a_token_alone_has_the_bytes_of_a_dense_layer_it_has_among_others(rows, columns):
    _, packed, _ = packed_layer(rows, columns)
    x = random(700, columns)
    whole = prefill_linear(x, packed)
    for start, end in [(0, 1), (699, 700), (5, 40), (3, 80), (64, 180), (100, 400)]:
        assert torch.equal(prefill_linear(x[start:end].clone(), packed), whole[start:end]), (start, end)


def linear_in(geometry, x, packed):
    """`prefill_linear` with tiles that the shape may not call for."""
    with patch.object(prefill, "prefill_geometry", lambda rows, tokens: geometry), uninitialised_is_nan():
        return prefill_linear(x, packed)


@pytest.mark.parametrize("tokens", DENSE_EDGES)
@pytest.mark.parametrize(("rows", "columns"), [(5120, 2880), (2880, 512), (136, 160), (8, 32)])
def test_the_tiles_of_a_dense_layer_change_no_bytes(tokens, rows, columns):
    weight, packed, _ = packed_layer(rows, columns)
    x = random(tokens, columns)
    expected = reference.linear(x.float(), weight.float(), packed.bias.float())
    outs = [linear_in(geometry, x, packed) for geometry in GEOMETRIES]
    assert (outs[0].float() - expected).norm() / expected.norm() < 5e-3
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_hundred_runs_of_a_dense_layer_give_the_same_bytes(geometry):
    """Warps, and blocks of a cluster, meet at other times in each."""
    _, packed, _ = packed_layer(5120, 2880)
    x = random(1200, 2880)
    first = linear_in(geometry, x, packed)
    assert all(torch.equal(linear_in(geometry, x, packed), first) for _ in range(100))


@pytest.fixture(scope="module", params=SHAPES)
def layer(request):
    yield Layer(*SHAPES[request.param])
    torch.cuda.empty_cache()


def run(layer, x, ids, weights):
    with uninitialised_is_nan():
        return prefill_experts(x, Routing(ids, weights), *layer.packed, LIMIT)


def run_in(kernel, layer, x, ids, weights):
    """`run` by a kernel that the number of pairs may not call for."""
    geometry, pairs = KERNELS[kernel], 0 if kernel == "prefill" else 10**6
    with (
        patch.object(experts, "STREAM_PAIRS", pairs),
        patch.object(experts, "stream_geometry", lambda pairs, count: geometry),
    ):
        return run(layer, x, ids, weights)


@pytest.mark.parametrize("count", [1, 17, 64, 300, 2048])
def test_experts_are_the_reference(layer, count):
    tokens = layer.tokens(count)
    out = run(layer, *tokens)
    assert out.shape == (count, layer.top_k, layer.hidden)
    assert distance(out, layer.exact(*tokens)) < 5e-3


@pytest.mark.parametrize("alike", [False, True], ids=["random choices", "the same experts"])
@pytest.mark.parametrize("count", TILE_EDGES)
def test_the_kernel_and_how_it_cuts_tokens_in_tiles_change_no_bytes(layer, count, alike):
    x, ids, weights = layer.tokens(count)
    ids = ids[:1].expand(count, -1) if alike else ids
    outs = {kernel: run_in(kernel, layer, x, ids, weights) for kernel in KERNELS}
    expected = outs["prefill"]
    for kernel, out in outs.items():
        assert torch.equal(out, expected), kernel
    assert distance(expected, layer.exact(x, ids, weights)) < 5e-3
    for token in (0, count // 2, count - 1):
        alone = x[token:][:1], ids[token:][:1], weights[token:][:1]
        for kernel in KERNELS:
            assert torch.equal(run_in(kernel, layer, *alone), expected[token:][:1]), (kernel, token)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_hundred_runs_give_the_same_bytes(layer, kernel):
    """Warps, and blocks of a cluster, meet at other times in each."""
    tokens = layer.tokens(777)
    first = run_in(kernel, layer, *tokens)
    assert all(torch.equal(run_in(kernel, layer, *tokens), first) for _ in range(100))


@pytest.mark.parametrize("count", [40, 200, 1000])
def test_every_token_may_choose_the_same_experts(layer, count):
    x, ids, weights = layer.tokens(count)
    ids = ids[:1].expand(count, -1)
    assert distance(run(layer, x, ids, weights), layer.exact(x, ids, weights)) < 5e-3


def test_a_token_alone_has_the_bytes_of_its_experts_it_has_among_others(layer):
    x, ids, weights = layer.tokens(600)
    together = run(layer, x, ids, weights)
    for first, count in ((0, 1), (599, 1), (31, 8), (100, 17), (3, 64), (20, 300)):
        rows = slice(first, first + count)
        assert torch.equal(run(layer, x[rows], ids[rows], weights[rows]), together[rows]), (first, count)


def test_a_nan_in_one_token_stays_there(layer):
    x, ids, weights = layer.tokens(200)
    clean = run(layer, x, ids, weights)
    x[3] = torch.nan
    dirty = run(layer, x, ids, weights)
    assert dirty[3].isnan().all()
    dirty[3] = clean[3]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize("count", [64, 256, 500, 2048])
def test_a_captured_chain_replays_the_eager_bytes_for_new_inputs(count):
    """Each kernel starts before its predecessor has ended: none may read too early or write too soon."""
    layer = Layer(*SHAPES["20b"])
    _, packed, _ = packed_layer(2880, 2880)

    def chain(x, ids, weights):
        for _ in range(4):
            outputs = prefill_experts(x, Routing(ids, weights), *layer.packed, LIMIT)
            x = prefill_linear(outputs[:, 0].contiguous(), packed)
        return x

    inputs = [tensor.contiguous() for tensor in layer.tokens(count)]
    chain(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(*inputs)
    for _ in range(3):
        for old, new in zip(inputs, layer.tokens(count), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, chain(*inputs))
