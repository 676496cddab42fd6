"""Embedding, residual add, RMSNorm and routing on a Hopper GPU against the reference in float32."""

import pytest
import torch

from kernels import reference
from kernels.hopper.norm import add_norm, add_norm_route, embed_norm, prefill_add_norm, prefill_add_norm_route
from kernels.hopper.peers import ALONE

pytestmark = pytest.mark.gpu

TOKENS = [1, 2, 3, 8, 17, 64, 100, 256, 2048]
HIDDEN = [2880, 64, 3200]
EXPERTS = [6, 8, 24, 32, 128]
EPS = 1e-5
ROUTES = [add_norm_route, prefill_add_norm_route]
by_both = pytest.mark.parametrize("op", ROUTES, ids=["decode", "prefill"])


def random(*shape, seed=0, scale=1.0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=draw, device="cuda") * scale).bfloat16()


def poison(*shape, dtype=torch.bfloat16):
    """Leave garbage in the memory that the next allocation of this shape gets."""
    torch.full(shape, -1 if dtype == torch.int64 else torch.nan, dtype=dtype, device="cuda")


def error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def route(x, weight, bias, active, op=add_norm_route):
    """Routing alone: rows that are normed already, a weight of ones, and nothing added."""
    ones = torch.ones(x.shape[1], device="cuda")
    return op(x, torch.zeros_like(x), ones, EPS, weight, bias, active, ALONE)[2:]


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
    rows, out = embed_norm(ids, table, weight, EPS)
    assert torch.equal(rows, table[ids])
    assert error(out, reference.rms_norm(table[ids].float(), weight, EPS)) < 1e-2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_residual_takes_the_sum_of_its_parts_and_is_normed(tokens, hidden, count):
    x, parts, weight = random(tokens, hidden), random(tokens, count, hidden, seed=1), random(hidden, seed=2).float()
    poison(tokens, hidden)
    residual, out = add_norm(x, parts, weight, EPS, ALONE)
    total = parts[:, 0].float()
    for n in range(1, count):
        total = total + parts[:, n].float()
    assert torch.equal(residual, (x.float() + total).bfloat16())
    assert error(out, reference.rms_norm(residual.float(), weight, EPS)) < 1e-2
    poison(tokens, hidden)
    assert all(
        torch.equal(*both) for both in zip(prefill_add_norm(x, parts, weight, EPS, ALONE), (residual, out), strict=True)
    )


@by_both
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("experts", "hidden"), [*((count, 2880) for count in EXPERTS), (8, 256), (5, 96), (6, 72)])
def test_what_is_routed_is_the_norm_of_the_sum(op, tokens, experts, hidden):
    x, delta, scale = random(tokens, hidden), random(tokens, hidden, seed=1), random(hidden, seed=2).float()
    weight, bias = random(experts, hidden, seed=3, scale=0.03), random(experts, seed=4)
    poison(tokens, hidden)
    poison(tokens, 4, dtype=torch.int64)
    poison(tokens, 4, dtype=torch.float32)
    residual, out, ids, shares = op(x, delta, scale, EPS, weight, bias, 4, ALONE)
    assert torch.equal(residual, x + delta)
    assert error(out, reference.rms_norm(residual.float(), scale, EPS)) < 1e-2
    logits = out.double() @ weight.double().T + bias.double()
    best = logits.topk(4).values
    torch.testing.assert_close(logits.gather(1, ids), best, rtol=0, atol=1e-4)  # a near tie may go either way
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert error(shares, best.softmax(-1)) < 1e-4


@by_both
@pytest.mark.parametrize("experts", [6, 32, 128])
def test_route_agrees_with_the_reference_in_float32(op, experts):
    x, weight, bias = normed(64, 2880), random(experts, 2880, seed=1, scale=0.03), random(experts, seed=2)
    ids, shares = route(x, weight, bias, 4, op)
    expected_ids, expected_shares = reference.route(x.float(), weight.float(), bias.float(), 4)
    assert (ids == expected_ids).float().mean() > 0.98
    assert error(shares, expected_shares) < 1e-2


@by_both
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("active", [1, 2, 4])
def test_of_equal_logits_the_lower_expert_goes_first(op, experts, active):
    x = random(3, 2880)
    bias = torch.zeros(experts, dtype=torch.bfloat16, device="cuda")
    bias[1::2] = -0.0  # equals 0.0
    ids, shares = route(x, torch.zeros(experts, 2880, dtype=torch.bfloat16, device="cuda"), bias, active, op)
    assert ids.tolist() == [list(range(active))] * 3
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / active))
    bias[:] = -3.0
    bias[experts - 1] = bias[experts - 2] = -2.0
    ids, _ = route(x, torch.zeros(experts, 2880, dtype=torch.bfloat16, device="cuda"), bias, active, op)
    assert ids.tolist() == [[experts - 2, experts - 1, 0, 1][:active]] * 3


@by_both
@pytest.mark.parametrize("experts", [6, 32, 128])
def test_a_token_alone_has_the_bytes_it_has_among_others(op, experts):
    x, parts, scale = random(300, 2880), random(300, 4, 2880, seed=3), random(2880, seed=4).float()
    weight, bias = random(experts, 2880, seed=1, scale=0.03), random(experts, seed=2)

    def everything(rows):
        some, more = x[rows].clone(), parts[rows].clone()
        one = more[:, 0].contiguous()
        return *add_norm(some, more, scale, EPS, ALONE), *op(some, one, scale, EPS, weight, bias, 4, ALONE)

    whole = everything(slice(None))
    for start, end in [(0, 1), (299, 300), (5, 8), (60, 77), (100, 164)]:
        alone = everything(slice(start, end))
        assert all(torch.equal(a, w[start:end]) for a, w in zip(alone, whole, strict=True)), (start, end)


@by_both
def test_not_a_number_still_routes_to_experts_that_exist(op):
    x = torch.full((5, 2880), torch.nan, dtype=torch.bfloat16, device="cuda")
    ids, _ = route(x, random(32, 2880), random(32, seed=1), 4, op)
    assert ids.min() >= 0
    assert ids.max() < 32
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_a_captured_chain_replays_what_runs_one_by_one(tokens):
    x, scale = random(tokens, 2880), torch.ones(2880, device="cuda")
    weight, bias = random(128, 2880, seed=1, scale=0.03), random(128, seed=2)
    table = random(500, 2880, seed=3)

    def chain(pause):
        residual, delta, outs = x, torch.zeros_like(x), []
        for _ in range(8):
            residual, out, ids, shares = add_norm_route(residual, delta, scale, EPS, weight, bias, 4, ALONE)
            pause()
            delta, _ = embed_norm((ids[:, 0] * 3).int(), table, scale, EPS)
            pause()
            residual, delta = add_norm(residual, torch.stack((delta, out), dim=1), scale, EPS, ALONE)
            pause()
            outs += [ids, shares]
        return [*outs, residual]

    expected = chain(torch.cuda.synchronize)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(lambda: None)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
