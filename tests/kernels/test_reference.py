"""The reference operations against their plain, whole-batch definitions, and against their own neighbours."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from kernels import reference
from kernels.ops import (
    NO_MASK,
    AttentionParameters,
    KvPages,
    Norm,
    Peers,
    Rope,
    Router,
    Sampled,
    SamplingState,
    TokenCounts,
    TokenMasks,
    TokenPlaces,
)
from tests.harness import ALONE

ONE_RANK = Peers(ALONE)
PAGE = 64
ABSURD = 10**9  # a page id that no pool has
ROUNDED = 2.0**-8  # relative error of a number rounded to bfloat16, at most; over many less than half of it


def dense_attention(q, k, v, position, sinks, window):
    """One query [heads, D] over its whole history k, v [kv_heads, keys, D], in float64."""
    group = q.shape[0] // k.shape[0]
    scores = torch.einsum("hd,hkd->hk", q.double(), k.double().repeat_interleave(group, 0)) / math.sqrt(q.shape[1])
    at = torch.arange(k.shape[1])
    seen = (at <= position) & (at > position - (window or 10**9))
    scores = torch.cat([scores.masked_fill(~seen, -math.inf), sinks.double().unsqueeze(1)], dim=1)
    return torch.einsum("hk,hkd->hd", scores.softmax(-1)[:, :-1], v.double().repeat_interleave(group, 0))


def paged(history, pages, poison):
    """Scatter [kv_heads, keys, D] over shuffled pages of a poisoned pool: the pool and the table row."""
    kv_heads, keys, dim = history.shape
    pool = torch.full((pages, kv_heads, PAGE, dim), poison)
    used = torch.randperm(pages - 1)[: -(-keys // PAGE)] + 1
    for entry, page in enumerate(used):
        written = history[:, entry * PAGE : (entry + 1) * PAGE]
        pool[page, :, : written.shape[1]] = written
    return pool, used


@pytest.mark.parametrize("window", [None, 1, 64, 128, 200])
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128, 129, 700, 1024])
def test_attention_over_pages_equals_dense_attention_whatever_lies_in_unused_places(window, keys):
    torch.manual_seed(keys)
    heads, kv_heads, dim, entries = 8, 2, 32, 16
    k, v = torch.randn(2, kv_heads, keys, dim)
    pool_k, used = paged(k, 40, math.nan)
    pool_v = torch.full_like(pool_k, math.nan)
    for entry, page in enumerate(used):
        written = v[:, entry * PAGE : (entry + 1) * PAGE]
        pool_v[page, :, : written.shape[1]] = written
    table = torch.full((3, entries), ABSURD, dtype=torch.int32)
    table[1, : len(used)] = used
    positions = torch.arange(max(0, keys - 20), keys, dtype=torch.int32)
    q = torch.randn(len(positions), heads, dim)
    sinks = torch.randn(heads)
    slots = torch.ones_like(positions)
    out = reference.attention(q, pool_k, pool_v, table, slots, positions, sinks, window)
    expected = torch.stack(
        [dense_attention(query, k, v, int(at), sinks, window) for query, at in zip(q, positions, strict=True)]
    )
    assert relative_error(out, expected.flatten(1)) < 1e-5


def test_attention_with_a_large_sink_takes_no_value():
    keys = torch.randn(2, 1, PAGE, 32)
    one = torch.ones(1, dtype=torch.int32)
    out = reference.attention(
        torch.randn(1, 4, 32), keys, keys, one.view(1, 1), one * 0, one, torch.full((4,), 1e4), None
    )
    assert torch.equal(out, torch.zeros(1, 128))


def test_attention_in_bfloat16_rounds_its_result_only():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, PAGE, 32).bfloat16()
    q, sinks, slot, at = (
        torch.randn(1, 8, 32).bfloat16(),
        torch.randn(8),
        torch.zeros(1).int(),
        torch.tensor([63]).int(),
    )
    out = reference.attention(q, keys, values, slot.view(1, 1), slot, at, sinks, None)
    expected = dense_attention(q[0], keys[0], values[0], 63, sinks, None)
    assert relative_error(out, expected.flatten().unsqueeze(0)) < ROUNDED / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated_and_keys_and_values_are_written_to_their_pages(dtype):
    torch.manual_seed(0)
    heads, kv_heads, dim = 4, 2, 32
    angles = torch.rand(3 * PAGE, dim // 2) * 6
    keys, values = torch.zeros(2, 5, kv_heads, PAGE, dim, dtype=dtype)
    table = torch.tensor([[1, 4, ABSURD], [ABSURD, 3, 2]])
    places = TokenPlaces(torch.tensor([70, 130, 3]).int(), torch.tensor([0, 1, 0]).int())
    qkv = torch.randn(3, (heads + 2 * kv_heads) * dim).to(dtype)
    q = reference.rope_append(
        qkv, angles.cos(), angles.sin(), places.positions, places.slots, table, keys, values
    )  # [3, heads, dim]
    pairs = qkv.double().view(3, -1, 2, dim // 2)  # heads, then the two halves of each
    turned = torch.complex(pairs[:, :, 0], pairs[:, :, 1]) * torch.polar(
        torch.ones(3, 1, dim // 2).double(), angles[places.positions].double().unsqueeze(1)
    )
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    error = 1e-6 if dtype is torch.float32 else ROUNDED / 2
    assert relative_error(q, expected[:, :heads]) < error
    for token, (page, offset) in enumerate([(4, 6), (2, 2), (1, 3)]):
        assert relative_error(keys[page, :, offset], expected[token, heads : heads + kv_heads]) < error
        assert torch.equal(values[page, :, offset], qkv[token].view(-1, dim)[-kv_heads:])
    assert int((keys != 0).any(-1).sum()) == int((values != 0).any(-1).sum()) == 3 * kv_heads  # and nowhere else


def test_attention_of_the_contract_sees_the_keys_that_it_writes():
    torch.manual_seed(0)
    heads, kv_heads, dim, tokens = 4, 2, 32, 70
    rope = Rope(torch.ones(128, dim // 2), torch.zeros(128, dim // 2))  # turns nothing
    pages = KvPages(*torch.full((2, 3, kv_heads, PAGE, dim), math.nan), torch.tensor([[2, 1]]).int())
    places = TokenPlaces(torch.arange(tokens).int(), torch.zeros(tokens).int())
    qkv, sinks = torch.randn(tokens, (heads + 2 * kv_heads) * dim), torch.randn(heads)
    q, k, v = qkv.view(tokens, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    for window in (None, 20):
        out = reference.prefill.attention(qkv, places, rope, pages, AttentionParameters(sinks, window))
        expected = [
            dense_attention(q[n], k.transpose(0, 1), v.transpose(0, 1), n, sinks, window) for n in range(tokens)
        ]
        assert relative_error(out, torch.stack(expected).flatten(1)) < 1e-5


def relative_error(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def random_experts(experts, rows, columns, dtype=torch.float32):
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    return blocks, scales, torch.randn(experts, rows).to(dtype)


def plain_mxfp4(blocks, scales):
    """Value by value, from the format's definition."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    out = torch.empty(*blocks.shape[:-1], 32)
    for byte in range(16):
        for half in range(2):
            nibble = (blocks[..., byte].int() >> (4 * half)) & 0xF
            magnitude = torch.tensor(values)[nibble & 7]
            out[..., 2 * byte + half] = torch.where(nibble >= 8, -magnitude, magnitude)
    return (out * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(-2)


def test_dequantised_mxfp4_is_exact():
    blocks, scales, _ = random_experts(3, 10, 96)
    assert torch.equal(reference.dequantize(blocks, scales, torch.float32), plain_mxfp4(blocks, scales))
    assert torch.equal(reference.dequantize(blocks, scales, torch.bfloat16).float(), plain_mxfp4(blocks, scales))


@pytest.mark.parametrize("tokens", [1, 3, 8, 33])
@pytest.mark.parametrize("routing", ["random", "all to one expert"])
def test_experts_equal_a_dense_mixture(tokens, routing):
    torch.manual_seed(tokens)
    experts, top_k, hidden, inner, limit = 6, 4, 96, 64, 7.0
    gate_up, down = random_experts(experts, 2 * inner, hidden), random_experts(experts, hidden, inner)
    x = torch.randn(tokens, hidden) * 3
    if routing == "random":
        expert_ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    else:
        expert_ids = torch.full((tokens, top_k), 5)
    weights = torch.rand(tokens, top_k)
    out = reference.experts(x, expert_ids, weights, gate_up, down, limit)
    w1, w2 = plain_mxfp4(*gate_up[:2]).double(), plain_mxfp4(*down[:2]).double()
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for expert, weight in zip(expert_ids[token], weights[token], strict=True):
            h = w1[expert] @ x[token].double() + gate_up[2][expert]
            gate, up = h[0::2].clamp(max=limit), h[1::2].clamp(-limit, limit)
            h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            expected[token] += weight * (w2[expert] @ h + down[2][expert])
    assert relative_error(out.sum(1), expected) < 1e-5


def test_expert_outputs_are_weighted_and_added_up_in_float32():
    torch.manual_seed(0)
    bias = torch.randn(5, 96).bfloat16()
    zeros = torch.zeros(5, 96, 1, 16, dtype=torch.uint8), torch.full((5, 96, 1), 127, dtype=torch.uint8)
    down = (*zeros, bias)  # each expert's output is its bias
    ids, weights = torch.stack([torch.randperm(5)[:4] for _ in range(9)]), torch.rand(9, 4)
    out = reference.experts(
        torch.randn(9, 96).bfloat16(), ids, weights, random_experts(5, 64, 96, torch.bfloat16), down, 7.0
    )
    assert torch.equal(out[:, 0], (bias[ids].float() * weights.unsqueeze(-1)).sum(1).bfloat16())


def test_the_gate_is_clamped_above_and_the_other_half_on_both_sides_in_float32():
    gate, up = torch.tensor([[9.0, 3.0, -9.0, 1.1], [2.0, 9.0, -9.0, 0.3]]).bfloat16()
    out = reference.swiglu(gate, up, 4.0)
    a, b = torch.tensor([4.0, 3.0, -9.0, gate[3]]).double(), torch.tensor([2.0, 4.0, -4.0, up[3]]).double()
    torch.testing.assert_close(out, (a * torch.sigmoid(1.702 * a) * (b + 1)).float())


def test_norms_and_sums_round_to_bfloat16_once():
    torch.manual_seed(0)
    x, outputs = torch.randn(7, 96).bfloat16(), torch.randn(7, 4, 96).bfloat16()
    norm = Norm(torch.randn(96), 1e-5)
    residual, h = reference.decode.add_norm(x, outputs, norm, ONE_RANK)
    assert torch.equal(residual, (x.float() + outputs.float().sum(1)).bfloat16())
    wide = residual.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    assert ((h.double() - expected).abs() <= 1.01 * ROUNDED * expected.abs()).all()


class SecondOfTwo:
    """A rank whose peer contributes `other` to each sum."""

    rank, size = 1, 2

    def __init__(self, other):
        self.other = other

    def all_reduce(self, x):
        assert x.dtype is self.other.dtype  # what crosses between ranks has the compute dtype
        return x.add_(self.other)


def test_partial_sums_cross_between_ranks_in_the_compute_dtype():
    torch.manual_seed(0)
    x, outputs, other = (torch.randn(7, *n, 96).bfloat16() for n in ((), (4,), ()))
    peers, norm, router = (
        Peers(SecondOfTwo(other)),
        Norm(torch.ones(96), 1e-5),
        Router(torch.randn(8, 96).bfloat16(), torch.randn(8).bfloat16(), 2),
    )
    own = outputs.float().sum(1).bfloat16()
    expected = (x.float() + (own + other).float()).bfloat16()
    residual, h = reference.decode.add_norm(x, outputs, norm, peers)
    assert torch.equal(residual, expected)
    routed, same, routing = reference.decode.add_norm_route(x, own, norm, router, peers)
    assert torch.equal(routed, expected)
    assert torch.equal(same, h)
    assert torch.equal(routing.expert_ids, reference.route(h, *router).expert_ids)


def test_the_residual_stream_takes_the_sum_of_expert_outputs_and_is_normed():
    torch.manual_seed(0)
    x, outputs, norm = torch.randn(5, 96), torch.randn(5, 4, 96), Norm(torch.randn(96), 1e-3)
    residual, h = reference.decode.add_norm(x, outputs, norm, ONE_RANK)
    torch.testing.assert_close(residual, x + outputs.sum(1))
    torch.testing.assert_close(h, torch.nn.functional.rms_norm(residual, (96,), norm.weight, norm.eps))
    router = Router(torch.randn(8, 96), torch.randn(8), 2)
    *same, routing = reference.decode.add_norm_route(x, outputs[:, 0], norm, router, ONE_RANK)
    for actual, expected in zip(same, reference.decode.add_norm(x, outputs[:, :1], norm, ONE_RANK), strict=True):
        assert torch.equal(actual, expected)
    best = (same[1] @ router.weight.T + router.bias).topk(2)
    assert torch.equal(routing.expert_ids, best.indices)
    torch.testing.assert_close(routing.weights, best.values.softmax(-1))


def test_router_takes_the_softmax_of_the_chosen_and_the_lower_id_of_equals():
    weight, bias = torch.zeros(6, 32), torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 3.0])
    routing = reference.route(torch.randn(2, 32), weight, bias, 3)
    assert routing.expert_ids.tolist() == [[5, 1, 2]] * 2
    torch.testing.assert_close(routing.weights[0], torch.tensor([3.0, 2.0, 2.0]).softmax(0))


def test_routing_weights_are_float32_whatever_the_compute_dtype():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((9, 96), (8, 96), (8,)))
    routing = reference.route(x, weight, bias, 4)
    chosen = reference.linear(x, weight, bias).double().gather(1, routing.expert_ids)
    torch.testing.assert_close(routing.weights, chosen.softmax(-1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bytes_alone_and_in_any_company(dtype):
    torch.manual_seed(0)
    tokens, hidden = 37, 96
    x = torch.randn(tokens, hidden).to(dtype)
    weight, bias = torch.randn(200, hidden).to(dtype), torch.randn(200).to(dtype)
    gate_up, down = random_experts(8, 128, hidden, dtype), random_experts(8, hidden, 64, dtype)
    router = torch.randn(8, hidden).to(dtype), torch.randn(8).to(dtype)
    keys, values = torch.randn(2, 20, 2, PAGE, 32).to(dtype)
    table = torch.randint(0, 20, (5, 12), dtype=torch.int32)
    slots = torch.randint(0, 5, (tokens,), dtype=torch.int32)
    positions = torch.randint(0, 12 * PAGE, (tokens,), dtype=torch.int32)
    q, sinks = torch.randn(tokens, 8, 32).to(dtype), torch.randn(8)

    def everything(rows):
        expert_ids, routing_weights = reference.route(x[rows], *router, 4)
        chosen, _, top = reference.top_logprobs(x[rows].float(), rows, 5)
        return torch.cat(
            [
                chosen.unsqueeze(1),
                top,
                reference.rms_norm(x[rows], torch.ones(hidden), 1e-5),
                reference.linear(x[rows], weight, bias),
                reference.experts(x[rows], expert_ids, routing_weights, gate_up, down, 7.0).flatten(1),
                reference.attention(q[rows], keys, values, table, slots[rows], positions[rows], sinks, None),
                reference.attention(q[rows], keys, values, table, slots[rows], positions[rows], sinks, 128),
            ],
            dim=1,
        )

    together = everything(torch.arange(tokens))
    for token in range(tokens):
        assert torch.equal(everything(torch.tensor([token]))[0], together[token])
    shuffled = torch.randperm(tokens)
    assert torch.equal(everything(shuffled), together[shuffled])


@pytest.mark.parametrize("tokens", [1, 8, 37])
def test_a_product_shows_the_library_one_shape_whatever_the_batch(tokens, monkeypatch):
    shapes, linear = set(), reference.F.linear

    def record(x, weight, bias):
        shapes.add(tuple(x.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(reference.F, "linear", record)
    x, weight, bias = torch.randn(tokens, 96), torch.randn(50, 96), torch.randn(50)
    torch.testing.assert_close(reference.linear(x, weight, bias), x @ weight.T + bias)
    assert shapes == {(reference.TILE, 96)}


# The sampler's filters ------------------------------------------------------------------------------------------------

VOCAB = 12
DRAWS = 1500


def draw_many(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    def rows(value, dtype):
        return torch.full((DRAWS,), value, dtype=dtype)

    numbers = torch.arange(DRAWS, dtype=torch.int32)
    return reference.draw(
        logits.expand(DRAWS, -1),
        rows(temperature, torch.float32),
        rows(top_k, torch.int32),
        rows(top_p, torch.float32),
        rows(min_p, torch.float32),
        torch.stack((numbers % 50, numbers % 7), dim=1),
        numbers // 50,
    )


def plain_filter(probabilities, top_k=0, top_p=1.0, min_p=0.0):
    """The definition, by sorting; the logits of the test have no ties."""
    order = probabilities.argsort(descending=True)
    keep = torch.zeros(VOCAB, dtype=torch.bool)
    limit = top_k or VOCAB
    reached, total = 0.0, float(probabilities[order[:limit]].sum())
    for token in order[:limit]:
        if reached >= top_p * total:
            break
        keep[token] = True
        reached += float(probabilities[token])
    keep &= probabilities >= min_p * probabilities.max()
    kept = torch.where(keep, probabilities, 0.0)
    return kept / kept.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(options):
    logits = torch.tensor([0.3, 2.0, -1.0, 0.9, 1.4, -0.2, 0.0, 1.1, -3.0, 0.6, 1.8, -0.7])
    filters = {name: value for name, value in options.items() if name != "temperature"}
    expected = plain_filter((logits.double() / options.get("temperature", 1.0)).softmax(0), **filters)
    counts = torch.bincount(draw_many(logits, **options).long(), minlength=VOCAB)
    assert int(counts[expected == 0].sum()) == 0
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept].numpy(), (expected[kept] * DRAWS).numpy()).pvalue > 1e-4


def test_temperature_zero_takes_the_largest_logit():
    logits = torch.randn(VOCAB)
    assert set(draw_many(logits, temperature=0.0, top_k=3).tolist()) == {int(logits.argmax())}


def test_logits_equal_to_the_threshold_all_stay():
    for filters in ({"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        drawn = draw_many(torch.tensor([1.0, 1.0, 1.0] + [0.0] * 9), **filters)
        assert set(drawn.tolist()) == {0, 1, 2}, filters


def test_a_draw_depends_on_seed_and_position_alone():
    logits = torch.randn(5, VOCAB)
    one = torch.ones(5)
    options = one, (one * 0).int(), one, one * 0
    seeds = torch.randint(-(2**31), 2**31, (5, 2)).int()
    positions = torch.arange(5, dtype=torch.int32)
    together = reference.draw(logits, *options, seeds, positions)
    for row in range(5):
        own = slice(row, row + 1)
        alone = reference.draw(logits[own], *(value[own] for value in options), seeds[own], positions[own])
        assert alone.item() == together[row].item()


def test_gumbel_noise_is_standard_gumbel_and_uncorrelated_across_positions_and_seeds():
    at = torch.tensor(3, dtype=torch.int32)
    seed = torch.tensor([12345, -7], dtype=torch.int32)
    noise = reference.gumbel(20000, seed, at)
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-4
    for others in ((seed, at + 1), (seed + 1, at), (seed.flip(0), at)):
        other = reference.gumbel(20000, *others)
        assert abs(stats.spearmanr(noise.numpy(), other.numpy()).statistic) < 0.03


def test_penalties_follow_their_definitions():
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.0]])
    counts = torch.tensor([[0, 3, 1, 0]], dtype=torch.int32)
    prompt = torch.tensor([[1, 0, 0, 0]], dtype=torch.uint8)
    out = reference.penalize(logits, counts, prompt, torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.25]))
    torch.testing.assert_close(out, torch.tensor([[1.0, -4.0 - 1.5 - 0.25, 0.5 - 0.5 - 0.25, 1.0]]))


def test_bias_counts_only_before_its_position():
    until = torch.tensor([[10, 5, 0]], dtype=torch.int32)
    ids = torch.tensor([[1, 2, 0]], dtype=torch.int32)
    values = torch.tensor([[4.0, -math.inf, 0.0]])

    def biased(position):
        return reference.add_bias(torch.zeros(1, 3), ids, values, until, torch.tensor([position], dtype=torch.int32))

    assert biased(4).tolist() == [[0.0, 4.0, -math.inf]]
    assert biased(5).tolist() == [[0.0, 4.0, 0.0]]
    assert biased(10).tolist() == [[0.0, 0.0, 0.0]]


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = torch.randn(3, 50)
    tokens = torch.tensor([4, 0, 49], dtype=torch.int32)
    chosen, ids, values = reference.top_logprobs(logits, tokens, 20)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), expected[torch.arange(3), tokens.long()], atol=1e-5, rtol=0)
    torch.testing.assert_close(values.double(), expected.topk(20).values, atol=1e-5, rtol=0)
    assert torch.equal(ids, expected.topk(20).indices)


@pytest.fixture
def two_threads():
    """The library divides large sums among its threads, in a way that depends on the shape."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_scores_are_the_targets_and_the_likeliest_in_one_order_the_lower_id_of_equals_first():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)).round(decimals=1)  # with many equals
    logits[0, 7], logits[0, 9] = 0.0, -0.0
    targets = torch.tensor([9, 0, -1, 299, 17]).int()
    scored = reference.score(torch.nn.functional.pad(logits, (0, 4), value=100.0), targets, 0, 300, 8, ONE_RANK)
    for row, (values, target) in enumerate(zip(logits, targets.tolist(), strict=True)):
        order = values.sort(descending=True, stable=True).indices
        logprobs = values.double().log_softmax(-1)
        assert scored.top_ids[row].tolist() == order[:8].tolist()
        torch.testing.assert_close(scored.top_logprobs[row].double(), logprobs[order[:8]], atol=1e-5, rtol=0)
        if target >= 0:
            assert scored.ranks[row] == order.tolist().index(target) + 1
            torch.testing.assert_close(scored.logprobs[row].double(), logprobs[target], atol=1e-5, rtol=0)


def test_log_probabilities_have_the_same_bytes_alone_and_in_company():
    torch.manual_seed(0)
    logits, tokens = 3 * torch.randn(64, 50000), torch.arange(64, dtype=torch.int32)
    together = reference.top_logprobs(logits, tokens, 3)
    for row in range(64):
        own = slice(row, row + 1)
        for alone, value in zip(reference.top_logprobs(logits[own], tokens[own], 3), together, strict=True):
            assert torch.equal(alone, value[own])


# The start and the end of a step --------------------------------------------------------------------------------------


def sampling_state(slots, **values):
    """Neutral sampling parameters of `slots` slots, but for `values`."""
    floats, ints = torch.zeros(slots), torch.zeros(slots, dtype=torch.int32)
    entries = torch.zeros(slots, 2)
    neutral = SamplingState(
        temperature=floats,
        top_k=ints,
        top_p=floats + 1,
        min_p=floats,
        repetition_penalty=floats + 1,
        frequency_penalty=floats,
        presence_penalty=floats,
        seed=torch.zeros(slots, 2, dtype=torch.int32),
        prompt_tokens=ints,
        bias_ids=entries.int(),
        bias_values=entries,
        bias_until=entries.int(),
        logprobs=ints + 6,
    )
    return replace(neutral, **values)


def unmasked(rows, vocab):
    """Masks of rows that may draw all tokens."""
    return TokenMasks(torch.full((rows,), NO_MASK, dtype=torch.int32), torch.zeros(1, -(-vocab // 32)).int())


def test_a_masked_row_draws_allowed_tokens_alone_and_its_log_probabilities_are_those_of_the_raw_logits():
    torch.manual_seed(0)
    vocab = 70
    logits = torch.randn(4, vocab) * 3
    allowed = torch.zeros(2, 96, dtype=torch.bool)
    allowed[0, [3, 31, 32, 69]] = True
    allowed[1, 64] = True
    bits = allowed.view(2, 3, 32).long() << torch.arange(32)
    words = bits.sum(-1)
    masks = TokenMasks(torch.tensor([NO_MASK, 1, 0, 0]).int(), torch.where(words >= 2**31, words - 2**32, words).int())
    counts = TokenCounts(torch.zeros(4, vocab, dtype=torch.int32), torch.zeros(4, vocab, dtype=torch.uint8))
    state = sampling_state(4, temperature=torch.tensor([0.0, 0.0, 0.0, 30.0]), top_k=torch.tensor([0, 0, 0, 50]).int())
    drawn = set()
    for position in range(200):
        places = TokenPlaces(torch.full((4,), position).int(), torch.arange(4).int())
        sampled = reference.sample(logits, places, state, counts, masks, 5, ONE_RANK)
        first, second, third, fourth = sampled.tokens.tolist()
        assert (first, second) == (int(logits[0].argmax()), 64)
        assert third == max([3, 31, 32, 69], key=lambda token: logits[2, token])
        drawn.add(fourth)
    assert drawn == {3, 31, 32, 69}
    raw = logits.log_softmax(-1)
    torch.testing.assert_close(sampled.logprobs, raw[torch.arange(4), sampled.tokens.long()], atol=1e-5, rtol=0)
    assert torch.equal(sampled.top_ids, raw.topk(5).indices)


def test_each_row_is_sampled_by_the_parameters_and_counts_of_its_slot():
    torch.manual_seed(0)
    slots, vocab = 4, 30
    logits = torch.randn(3, vocab)
    best = logits.argmax(1)
    counts = TokenCounts(torch.zeros(slots, vocab, dtype=torch.int32), torch.zeros(slots, vocab, dtype=torch.uint8))
    counts.output[2, best[0]] = 3  # row 0: a frequency penalty drives its best token away
    counts.in_prompt[0, best[1]] = 1  # row 1: has no penalty
    state = sampling_state(slots, frequency_penalty=torch.tensor([0.0, 0.0, 2.0, 0.0]))
    state.bias_ids[3, 1], state.bias_values[3, 1], state.bias_until[3, 1] = int(best[2]), -math.inf, 10
    places = TokenPlaces(torch.tensor([5, 5, 9]).int(), torch.tensor([2, 0, 3]).int())
    sampled = reference.sample(logits, places, state, counts, unmasked(3, vocab), 5, ONE_RANK)
    second = logits.topk(2).indices[:, 1]
    assert sampled.tokens.tolist() == [int(second[0]), int(best[1]), int(second[2])]
    raw = logits.double().log_softmax(-1)  # of the raw logits: neither penalties nor bias show
    torch.testing.assert_close(
        sampled.logprobs.double(), raw[torch.arange(3), sampled.tokens.long()], atol=1e-5, rtol=0
    )
    assert torch.equal(sampled.top_ids, raw.topk(5).indices)
    state.logprobs.copy_(torch.tensor([1, 6, 0, 6]))  # by slot: the drawn token's alone; none
    less = reference.sample(logits, places, state, counts, unmasked(3, vocab), 5, ONE_RANK)
    assert torch.equal(less.tokens, sampled.tokens)
    assert less.logprobs.tolist() == [0, *sampled.logprobs.tolist()[1:]]
    assert less.top_ids.tolist() == [[0] * 5, [0] * 5, sampled.top_ids.tolist()[2]]
    assert less.top_logprobs.tolist() == [[0] * 5, [0] * 5, sampled.top_logprobs.tolist()[2]]
    late = TokenPlaces(torch.tensor([5, 5, 10]).int(), places.slots)
    assert reference.sample(logits, late, state, counts, unmasked(3, vocab), 5, ONE_RANK).tokens.tolist()[2] == int(
        best[2]
    )


def test_an_emitted_token_is_its_slots_next_input_and_counts_once_a_row():
    slots, padding = torch.tensor([4, 1, 6, 6]).int(), 6
    counts = TokenCounts(torch.zeros(7, 9, dtype=torch.int32), torch.zeros(7, 9, dtype=torch.uint8))
    counts.output[1, 8] = 2
    last_token, outputs = torch.full((7,), -1).int(), torch.full((5, 2 + 2 * 3), -1).int()
    sampled = Sampled(
        torch.tensor([3, 8, 5, 5]).int(),
        torch.tensor([-0.5, -1.5, -2.5, -3.5]),
        torch.arange(8).view(4, 2),
        -torch.arange(8).view(4, 2) / 4,
    )
    reference.emit(sampled, slots, last_token, counts, outputs)
    assert last_token.tolist() == [-1, 8, -1, -1, 3, -1, 5]
    assert {tuple(at): int(counts.output[tuple(at)]) for at in counts.output.nonzero().tolist()} == {
        (4, 3): 1,
        (1, 8): 3,
        (padding, 5): 2,
    }
    assert not counts.in_prompt.any()
    assert outputs[:4, 0].tolist() == sampled.tokens.tolist()
    assert outputs[:4, 1].view(torch.float32).tolist() == sampled.logprobs.tolist()
    assert outputs[:4, 2:4].tolist() == sampled.top_ids.tolist()
    assert outputs[:4, 5:7].view(torch.float32).tolist() == sampled.top_logprobs.tolist()
    assert (outputs[4] == -1).all()
    assert (outputs[:, [4, 7]] == -1).all()  # room for a third of the likeliest


def test_a_decode_step_begins_with_last_tokens_and_notes_pages_that_begin():
    pages = KvPages(*torch.zeros(2, 3, 1, 16, 8), torch.full((3, 4), 7).int())  # 16 tokens a page
    places = TokenPlaces(torch.tensor([16, 31, 0]).int(), torch.tensor([2, 0, 1]).int())
    last_token = torch.tensor([10, 11, 12]).int()
    tokens, next_positions = reference.advance(places, torch.tensor([5, -1, 0]).int(), pages, last_token)
    assert tokens.tolist() == [12, 10, 11]
    assert next_positions.tolist() == [17, 32, 1]
    assert pages.table.tolist() == [[7, 7, 7, 7], [0, 7, 7, 7], [7, 5, 7, 7]]
