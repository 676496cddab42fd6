"""Embedding, residual add, RMSNorm and routing on a Hopper GPU against the reference in float32."""

import pytest
import torch

from kernels import reference
from kernels.hopper import decode, prefill
from kernels.ops import Norm, Peers, Router
from tests.harness import ALONE

pytestmark = pytest.mark.gpu

TOKENS = [1, 2, 3, 8, 17, 64, 100, 256, 2048]
HIDDEN = [2880, 64, 3200]
EXPERTS = [6, 8, 24, 32, 128]
EPS = 1e-5
PEERS = Peers(ALONE)
by_both = pytest.mark.parametrize("kind", [decode, prefill], ids=["decode", "prefill"])


def random(*shape, seed=0, scale=1.0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=draw, device="cuda") * scale).bfloat16()


def poison(*shape, dtype=torch.bfloat16):
    """Leave garbage in the memory that the next allocation of this shape gets."""
    torch.full(shape, -1 if dtype == torch.int64 else torch.nan, dtype=dtype, device="cuda")


def error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def route(kind, x, router):
    """Routing alone: rows that are normed already, a weight of ones, and nothing added."""
    ones = Norm(torch.ones(x.shape[1], device="cuda"), EPS)
    return kind.add_norm_route(x, torch.zeros_like(x), ones, router, PEERS)[2]


def normed(tokens, hidden):
    """Rows whose norm is a scaling that bf16 does not see."""
    x = random(tokens, hidden).float()
    return reference.rms_norm(x, torch.ones(hidden, device="cuda"), EPS).bfloat16()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_embedding_takes_rows_and_norms_them(tokens, hidden):
    table, weight = random(1000, hidden, scale=3.0), random(hidden, seed=1).float()
    ids = torch.randint(0, 1000, (tokens,), dtype=torch.int32, device="cuda")
    ids[0], ids[-1] = 999, 0
    poison(tokens, hidden)
    rows, out = decode.embed_norm(ids, table, Norm(weight, EPS))
    assert torch.equal(rows, table[ids])
    assert error(out, reference.rms_norm(table[ids].float(), weight, EPS)) < 1e-2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_residual_takes_the_sum_of_the_expert_outputs_and_is_normed(tokens, hidden, count):
    x, outputs, weight = random(tokens, hidden), random(tokens, count, hidden, seed=1), random(hidden, seed=2).float()
    norm = Norm(weight, EPS)
    poison(tokens, hidden)
    residual, out = decode.add_norm(x, outputs, norm, PEERS)
    total = outputs[:, 0].float()
    for n in range(1, count):
        total = total + outputs[:, n].float()
    assert torch.equal(residual, (x.float() + total).bfloat16())
    assert error(out, reference.rms_norm(residual.float(), weight, EPS)) < 1e-2
    poison(tokens, hidden)
    of_prefill = prefill.add_norm(x, outputs, norm, PEERS)
    assert all(torch.equal(*both) for both in zip(of_prefill, (residual, out), strict=True))


@by_both
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("experts", "hidden"), [*((count, 2880) for count in EXPERTS), (8, 256), (5, 96), (6, 72)])
def test_what_is_routed_is_the_norm_of_the_sum(kind, tokens, experts, hidden):
    x, delta, scale = random(tokens, hidden), random(tokens, hidden, seed=1), random(hidden, seed=2).float()
    router = Router(random(experts, hidden, seed=3, scale=0.03), random(experts, seed=4), 4)
    poison(tokens, hidden)
    poison(tokens, 4, dtype=torch.int64)
    poison(tokens, 4, dtype=torch.float32)
    residual, out, (ids, weights) = kind.add_norm_route(x, delta, Norm(scale, EPS), router, PEERS)
    assert torch.equal(residual, x + delta)
    assert error(out, reference.rms_norm(residual.float(), scale, EPS)) < 1e-2
    logits = out.double() @ router.weight.double().T + router.bias.double()
    best = logits.topk(4).values
    torch.testing.assert_close(logits.gather(1, ids), best, rtol=0, atol=1e-4)  # a near tie may go either way
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert error(weights, best.softmax(-1)) < 1e-4


@by_both
@pytest.mark.parametrize("experts", [6, 32, 128])
def test_route_agrees_with_the_reference_in_float32(kind, experts):
    x, weight, bias = normed(64, 2880), random(experts, 2880, seed=1, scale=0.03), random(experts, seed=2)
    routing = route(kind, x, Router(weight, bias, 4))
    expected = reference.route(x.float(), weight.float(), bias.float(), 4)
    assert (routing.expert_ids == expected.expert_ids).float().mean() > 0.98
    assert error(routing.weights, expected.weights) < 1e-2


@by_both
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_of_equal_logits_the_lower_expert_goes_first(kind, experts, top_k):
    x, zeros = random(3, 2880), torch.zeros(experts, 2880, dtype=torch.bfloat16, device="cuda")
    bias = torch.zeros(experts, dtype=torch.bfloat16, device="cuda")
    bias[1::2] = -0.0  # equals 0.0
    ids, weights = route(kind, x, Router(zeros, bias, top_k))
    assert ids.tolist() == [list(range(top_k))] * 3
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / top_k))
    bias[:] = -3.0
    bias[experts - 1] = bias[experts - 2] = -2.0
    ids, _ = route(kind, x, Router(zeros, bias, top_k))
    assert ids.tolist() == [[experts - 2, experts - 1, 0, 1][:top_k]] * 3


@by_both
@pytest.mark.parametrize("experts", [6, 32, 128])
def test_a_token_alone_has_the_bytes_it_has_among_others(kind, experts):
    x, outputs = random(300, 2880), random(300, 4, 2880, seed=3)
    norm = Norm(random(2880, seed=4).float(), EPS)
    router = Router(random(experts, 2880, seed=1, scale=0.03), random(experts, seed=2), 4)

    def everything(rows):
        some, more = x[rows].clone(), outputs[rows].clone()
        residual, out, routing = kind.add_norm_route(some, more[:, 0].contiguous(), norm, router, PEERS)
        return *kind.add_norm(some, more, norm, PEERS), residual, out, *routing

    whole = everything(slice(None))
    for start, end in [(0, 1), (299, 300), (5, 8), (60, 77), (100, 164)]:
        alone = everything(slice(start, end))
        assert all(torch.equal(a, w[start:end]) for a, w in zip(alone, whole, strict=True)), (start, end)


@by_both
def test_not_a_number_still_routes_to_experts_that_exist(kind):
    x = torch.full((5, 2880), torch.nan, dtype=torch.bfloat16, device="cuda")
    ids, _ = route(kind, x, Router(random(32, 2880), random(32, seed=1), 4))
    assert ids.min() >= 0
    assert ids.max() < 32
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_a_captured_chain_replays_what_runs_one_by_one(tokens):
    x, norm = random(tokens, 2880), Norm(torch.ones(2880, device="cuda"), EPS)
    router = Router(random(128, 2880, seed=1, scale=0.03), random(128, seed=2), 4)
    table = random(500, 2880, seed=3)

    def chain(pause):
        residual, delta, outs = x, torch.zeros_like(x), []
        for _ in range(8):
            residual, out, routing = decode.add_norm_route(residual, delta, norm, router, PEERS)
            pause()
            delta, _ = decode.embed_norm((routing.expert_ids[:, 0] * 3).int(), table, norm)
            pause()
            residual, delta = decode.add_norm(residual, torch.stack((delta, out), dim=1), norm, PEERS)
            pause()
            outs += routing
        return [*outs, residual]

    expected = chain(torch.cuda.synchronize)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain(lambda: None)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
