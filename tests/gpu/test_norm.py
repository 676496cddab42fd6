"""RMSNorm, residual add, embedding and routing on a Hopper GPU against the reference in float32."""

import pytest
import torch

from kernels import reference
from kernels.hopper.norm import add_rms_norm, embed, rms_norm, route

pytestmark = pytest.mark.gpu

TOKENS = [1, 2, 3, 8, 17, 64, 100, 256, 2048]
HIDDEN = [2880, 64, 3200]
EXPERTS = [6, 8, 24, 32, 128]
EPS = 1e-5


def random(*shape, seed=0, scale=1.0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=draw, device="cuda") * scale).bfloat16()


def poison(*shape, dtype=torch.bfloat16):
    """Leave garbage in the memory that the next allocation of this shape gets."""
    torch.full(shape, -1 if dtype == torch.int64 else torch.nan, dtype=dtype, device="cuda")


def error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rms_norm_is_the_reference(tokens, hidden):
    x, weight = random(tokens, hidden, scale=3.0), random(hidden, seed=1).float()
    poison(tokens, hidden)
    assert error(rms_norm(x, weight, EPS), reference.rms_norm(x.float(), weight, EPS)) < 1e-2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_add_rms_norm_is_torchs_sum_and_the_norm_of_it(tokens, hidden):
    x, delta, weight = random(tokens, hidden), random(tokens, hidden, seed=1), random(hidden, seed=2).float()
    poison(tokens, hidden)
    residual, normed = add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(residual, x + delta)
    assert torch.equal(normed, rms_norm(residual, weight, EPS))


@pytest.mark.parametrize("tokens", TOKENS)
def test_embed_takes_rows(tokens):
    table = random(1000, 2880)
    ids = torch.randint(0, 1000, (tokens,), dtype=torch.int32, device="cuda")
    ids[0], ids[-1] = 999, 0
    poison(tokens, 2880)
    assert torch.equal(embed(ids, table), reference.embed(ids, table))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_route_chooses_the_largest_logits(tokens, experts):
    x, weight, bias = random(tokens, 2880), random(experts, 2880, seed=1, scale=0.03), random(experts, seed=2)
    poison(tokens, 4, dtype=torch.int64)
    poison(tokens, 4, dtype=torch.float32)
    ids, shares = route(x, weight, bias, 4)
    logits = x.double() @ weight.double().T + bias.double()
    best = logits.topk(4).values
    torch.testing.assert_close(logits.gather(1, ids), best, rtol=0, atol=1e-4)  # a near tie may go either way
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert error(shares, best.softmax(-1)) < 1e-4


@pytest.mark.parametrize("experts", [6, 32, 128])
def test_route_agrees_with_the_reference_in_float32(experts):
    x, weight, bias = random(64, 2880), random(experts, 2880, seed=1, scale=0.03), random(experts, seed=2)
    ids, shares = route(x, weight, bias, 4)
    expected_ids, expected_shares = reference.route(x.float(), weight.float(), bias.float(), 4)
    assert (ids == expected_ids).float().mean() > 0.99
    assert error(shares, expected_shares) < 1e-3


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("active", [1, 2, 4])
def test_of_equal_logits_the_lower_expert_goes_first(experts, active):
    x = random(3, 2880)
    bias = torch.zeros(experts, dtype=torch.bfloat16, device="cuda")
    bias[1::2] = -0.0  # equals 0.0
    ids, shares = route(x, torch.zeros(experts, 2880, dtype=torch.bfloat16, device="cuda"), bias, active)
    assert ids.tolist() == [list(range(active))] * 3
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / active))
    bias[:] = -3.0
    bias[experts - 1] = bias[experts - 2] = -2.0
    ids, _ = route(x, torch.zeros(experts, 2880, dtype=torch.bfloat16, device="cuda"), bias, active)
    assert ids.tolist() == [[experts - 2, experts - 1, 0, 1][:active]] * 3


@pytest.mark.parametrize("experts", [6, 32, 128])
def test_a_token_alone_has_the_bytes_it_has_among_others(experts):
    x, delta, scale = random(300, 2880), random(300, 2880, seed=3), random(2880, seed=4).float()
    weight, bias = random(experts, 2880, seed=1, scale=0.03), random(experts, seed=2)
    whole = (rms_norm(x, scale, EPS), *add_rms_norm(x, delta, scale, EPS), *route(x, weight, bias, 4))
    for start, end in [(0, 1), (299, 300), (5, 8), (60, 77), (100, 164)]:
        some, more = x[start:end].clone(), delta[start:end].clone()
        alone = (rms_norm(some, scale, EPS), *add_rms_norm(some, more, scale, EPS), *route(some, weight, bias, 4))
        assert all(torch.equal(a, w[start:end]) for a, w in zip(alone, whole, strict=True)), (start, end)


def test_not_a_number_still_routes_to_experts_that_exist():
    x = torch.full((5, 2880), torch.nan, dtype=torch.bfloat16, device="cuda")
    ids, _ = route(x, random(32, 2880), random(32, seed=1), 4)
    assert ids.min() >= 0
    assert ids.max() < 32
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_a_captured_chain_replays_what_runs_one_by_one(tokens):
    x, scale = random(tokens, 2880), torch.ones(2880, device="cuda")
    weight, bias = random(128, 2880, seed=1, scale=0.03), random(128, seed=2)
    table = random(500, 2880, seed=3)

    def chain(pause):
        residual, outs = x, []
        for _ in range(8):
            ids, shares = route(rms_norm(residual, scale, EPS), weight, bias, 4)
            pause()
            delta = embed((ids[:, 0] * 3).int(), table)
            pause()
            residual, _ = add_rms_norm(residual, delta, scale, EPS)
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
