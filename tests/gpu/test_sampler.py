"""The sampler on a GPU: the tokens and log probabilities of kernels.reference, row by row."""

import math

import pytest
import torch

from conf.limits import BIAS_ENTRIES
from graphs.buffers import sampling_state
from kernels import reference
from kernels.hopper.sampler import sample
from kernels.ops import NO_MASK, Peers, SamplingState, TokenCounts, TokenMasks, TokenPlaces
from tests.harness import ALONE

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
VOCABS = [20, 512, 1000, 201088]
NEUTRAL = {"top_p": 1.0, "repetition_penalty": 1.0, "logprobs": 21}
OPTIONS = {
    "greedy": {},
    "plain": {"temperature": 0.8},
    "hot": {"temperature": 2.0},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "many": {"temperature": 1.5, "top_k": 400},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "low_p": {"temperature": 1.0, "top_p": 0.1},
    "high_p": {"temperature": 1.3, "top_p": 0.9999},
    "min_p": {"temperature": 1.2, "min_p": 0.05},
    "filters": {"temperature": 1.1, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.25},
    "repetition": {"temperature": 1.0, "repetition_penalty": 0.7},
    "everything": {
        "temperature": 0.9,
        "top_k": 300,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
    },
}


def draw(*arguments):
    return sample(*arguments, Peers(ALONE))


def expected_draw(*arguments):
    return reference.sample(*arguments, Peers(ALONE))


def case(vocab, names, dtype=torch.float32, spread=3.0, bias=True, masked=False):
    """Arguments of `draw` for one row an option name, in shuffled slots; the last slot is the padding slot, zeros.

    masked: two rows of three have a mask, of which one allows three tokens in eight, the other a handful.
    """
    rows = len(names)
    chance = torch.Generator().manual_seed(vocab + rows)
    state = sampling_state(lambda shape, kind: torch.zeros(shape, dtype=getattr(torch, kind)), rows + 1)
    slots = torch.randperm(rows, generator=chance).int()
    for slot, option in zip(slots.tolist(), names, strict=True):
        for name, value in {**NEUTRAL, **OPTIONS[option]}.items():
            getattr(state, name)[slot] = value
    state.seed[:rows] = torch.randint(-(2**31), 2**31, (rows, 2), generator=chance).int()
    positions = torch.randint(0, 5000, (rows,), generator=chance).int()
    logits = (torch.randn(rows, vocab, generator=chance) * spread).to(dtype)
    if bias:  # several of one token, some no longer in force, some that forbid
        state.bias_ids[:rows, :40] = torch.randint(0, vocab, (rows, 40), generator=chance).int()
        state.bias_ids[:rows, 300:] = state.bias_ids[:rows, :20]
        values = torch.randint(-8, 9, (rows, BIAS_ENTRIES), generator=chance) / 4
        values[:, 10:14] = -math.inf
        state.bias_values[:rows] = values
        in_force = torch.randint(0, 2, values.shape, generator=chance).int()
        state.bias_until[slots.long()] = positions.unsqueeze(1) + in_force
        state.bias_until[:, 40:300] = 0
        state.bias_ids[slots.long(), 1] = logits.argmax(-1).int()  # of the likeliest token, three times
        state.bias_ids[slots.long(), 2] = logits.argmax(-1).int()
        state.bias_ids[slots.long(), 10] = logits.argmax(-1).int()
    counts = torch.randint(-6, 4, (rows + 1, vocab), generator=chance).clamp(min=0).int()
    prompt = (torch.rand(rows + 1, vocab, generator=chance) < 0.1).byte()
    words = torch.randint(-(2**31), 2**31, (3, 2, -(-vocab // 32)), generator=chance)
    words = (words[0] & (words[1] | words[2])).int()
    words[1] = 0
    words[1, :: words.shape[1] // 2 + 1] = 2**19 + 5  # of a word three tokens
    mask_rows = torch.arange(rows).int() % 3 - 1 if masked else torch.full((rows,), NO_MASK).int()
    masks = TokenMasks(mask_rows.to(DEVICE), words.to(DEVICE))
    state = SamplingState(**{name: value.to(DEVICE) for name, value in vars(state).items()})
    tensors = (tensor.to(DEVICE) for tensor in (logits, slots, positions, counts, prompt))
    logits, slots, positions, counts, prompt = tensors
    return logits, TokenPlaces(positions, slots), state, TokenCounts(counts, prompt), masks, min(20, vocab)


def check_logprobs(arguments, sampled):
    """Everything but the choice of the token."""
    logits, top = arguments[0].float(), arguments[-1]
    tokens, logprob, ids, values = sampled
    expected, _, best = reference.top_logprobs(logits, tokens, top)
    torch.testing.assert_close(logprob, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(values, best, atol=1e-4, rtol=0)
    order = logits.cpu().sort(dim=-1, descending=True, stable=True).indices[:, :top]  # lower ids first among equals
    assert torch.equal(ids.cpu().long(), order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_rows_of_every_kind_draw_what_the_reference_draws(rows, vocab, dtype):
    names = [list(OPTIONS)[(row + 3 * rows) % len(OPTIONS)] for row in range(rows)]
    arguments = case(vocab, names, dtype, masked=True)
    sampled = draw(*arguments)
    assert [out.dtype for out in sampled] == [torch.int32, torch.float32, torch.int32, torch.float32]
    expected = expected_draw(*arguments)[0]
    assert (sampled[0] != expected).sum() == 0
    check_logprobs(arguments, sampled)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_draws_the_references_tokens_at_many_positions(option):
    arguments = list(case(1000, [option] * 64, bias=False))
    different = 0
    for _ in range(4):
        arguments[1] = TokenPlaces(arguments[1].positions + 1, arguments[1].slots)
        different += int((draw(*arguments)[0] != expected_draw(*arguments)[0]).sum())
    assert different <= 1  # exp and log may round one tie the other way


@pytest.mark.parametrize("option", ["top_k", "top_p", "many", "filters"])
@pytest.mark.parametrize("spread", [0.0, 0.01, 30.0])
def test_filters_of_flat_and_of_steep_rows(option, spread):
    arguments = case(5000, [option] * 3, spread=spread, bias=False)
    assert torch.equal(draw(*arguments)[0], expected_draw(*arguments)[0])


def test_top_p_counts_a_crowd_of_unlikely_tokens():
    arguments = case(20000, ["low_p", "top_p"] * 8, spread=0.01, bias=False)
    arguments[0][:, 1:] -= 6 * arguments[2].temperature[arguments[1].slots].unsqueeze(
        1
    )  # 1/400 of the best, each of them
    sampled = draw(*arguments)
    assert len(set(sampled[0].tolist())) > 8
    assert torch.equal(sampled[0], expected_draw(*arguments)[0])


def test_ties_go_to_the_lower_id_and_all_stay_at_a_threshold():
    arguments = case(20000, ["greedy", "top_k", "top_p", "min_p"], bias=False)
    logits = arguments[0]
    logits.copy_((logits * 2).round() / 2)  # few different values
    logits[0, ::2], logits[0, 1::2] = 0.0, -0.0  # equal, all of them
    sampled = draw(*arguments)
    assert int(sampled[0][0]) == 0
    assert sampled[2][0].tolist() == list(range(20))
    assert torch.equal(sampled[0], expected_draw(*arguments)[0])
    check_logprobs(arguments, sampled)


@pytest.mark.parametrize("descending", [False, True])
def test_the_likeliest_tokens_of_a_sorted_row(descending):
    arguments = case(201088, ["greedy"], bias=False)
    arguments[0].copy_(torch.linspace(-20, 20, 201088).sort(descending=descending).values)
    sampled = draw(*arguments)
    assert int(sampled[0][0]) == (0 if descending else 201087)
    check_logprobs(arguments, sampled)


@pytest.mark.parametrize("top", [1, 5])
def test_fewer_likeliest_tokens(top):
    arguments = (*case(1000, ["greedy", "plain", "top_p"])[:-1], top)
    sampled = draw(*arguments)
    assert sampled[2].shape == sampled[3].shape == (3, top)
    assert torch.equal(sampled[0], expected_draw(*arguments)[0])
    check_logprobs(arguments, sampled)


def test_rows_get_what_they_ask_for_and_draw_the_same_tokens():
    arguments = case(20000, ["greedy", "plain", "top_p", "filters", "penalties"] * 3)
    everything = draw(*arguments)
    state, slots = arguments[2], arguments[1].slots
    state.logprobs[slots] = torch.tensor([0, 1, 2] * 5, dtype=torch.int32, device=DEVICE)
    sampled = draw(*arguments)
    assert torch.equal(sampled.tokens, everything.tokens)
    with_logprob, with_top = (state.logprobs[slots] > least for least in (0, 1))
    assert torch.equal(sampled.logprobs, torch.where(with_logprob, everything.logprobs, 0))
    assert torch.equal(sampled.top_ids, torch.where(with_top.unsqueeze(1), everything.top_ids, 0))
    assert torch.equal(sampled.top_logprobs, torch.where(with_top.unsqueeze(1), everything.top_logprobs, 0))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_mask_of_all_tokens_changes_nothing(option):
    logits, places, state, counts, masks, top = case(20000, [option] * 16)
    everything = TokenMasks(torch.zeros_like(masks.rows), torch.full_like(masks.words, -1))
    without, with_it = (draw(logits, places, state, counts, m, top) for m in (masks, everything))
    for one, other in zip(without, with_it, strict=True):
        assert torch.equal(one, other)


def test_an_infinite_logit_goes_to_its_lowest_token_with_a_temperature_too():
    arguments = case(20000, ["greedy", "plain", "hot"], bias=False)
    arguments[0][:, [70, 9000, 15001]] = math.inf
    assert draw(*arguments)[0].tolist() == [70, 70, 70]


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf, -math.inf])
def test_the_padding_slot_draws_some_token_whatever_its_logits(value):
    logits, places, *rest = case(1000, ["plain", "filters", "plain"])
    logits[1:] = value
    places.slots[2] = 3
    tokens, _, ids, _ = draw(logits, places, *rest)
    for some in (tokens, ids):
        assert int(some.min()) >= 0
        assert int(some.max()) < 1000


@pytest.mark.parametrize("vocab", [1000, 201088])
def test_a_row_alone_gives_the_bytes_it_gives_among_others(vocab):
    names = [list(OPTIONS)[row % len(OPTIONS)] for row in range(64)]
    logits, places, state, counts, masks, top = case(vocab, names, masked=True)
    together = draw(logits, places, state, counts, masks, top)
    for row in range(0, 64, 5):
        only = slice(row, row + 1)
        its_place, its_mask = TokenPlaces(places.positions[only], places.slots[only]), masks.rows[only]
        alone = draw(logits[only], its_place, state, counts, TokenMasks(its_mask, masks.words), top)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[row])
