"""The start and the end of a step on a Hopper GPU: what the reference does, entry by entry."""

import pytest
import torch

from kernels import reference
from kernels.hopper.step import advance, emit, install
from kernels.ops import Chunks, KvPages, Sampled, SamplingState, TokenCounts, TokenPlaces

pytestmark = pytest.mark.gpu
SLOTS, PAGES, VOCAB, ENTRIES = 300, 40, 1000, 320


def integers(*shape, high=1000, seed=0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, high, shape, generator=draw, device="cuda", dtype=torch.int32)


def rows_of(count):
    return torch.randperm(SLOTS - 1, device="cuda")[:count].int()


def sampling_of(rows, seed):
    """Parameters of which every third row has no penalties, and every seventh is as the padding slot's."""
    numbers = integers(rows, 5 + 2 * ENTRIES, high=2**31 - 1, seed=seed)
    fractions = torch.rand(rows, 3 + ENTRIES, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    state = SamplingState(
        temperature=fractions[:, 0].contiguous(),
        top_k=numbers[:, 1].contiguous(),
        top_p=fractions[:, 1].contiguous(),
        min_p=fractions[:, 2].contiguous(),
        repetition_penalty=torch.full((rows,), 1.5, device="cuda"),
        frequency_penalty=torch.zeros(rows, device="cuda"),
        presence_penalty=torch.zeros(rows, device="cuda"),
        seed=numbers[:, 2:4].contiguous(),
        prompt_tokens=integers(rows, high=200, seed=seed),
        bias_ids=numbers[:, 5 : 5 + ENTRIES].contiguous(),
        bias_values=fractions[:, 3:].contiguous(),
        bias_until=numbers[:, -ENTRIES:].contiguous(),
        logprobs=numbers[:, 4].contiguous(),
    )
    state.repetition_penalty[::3], state.repetition_penalty[::7] = 1, 0
    state.frequency_penalty[1::12], state.presence_penalty[9::12] = -0.5, 0.5
    return state


@pytest.mark.parametrize("sequences", [1, 3, 16, 256])
@pytest.mark.parametrize("vocab", [1000, 201088])
def test_install(sequences, vocab):
    slots, lengths = rows_of(sequences), 1 + integers(sequences, high=50, seed=1)
    last = lengths.cumsum(0).int() - 1
    starts = torch.where(integers(sequences, high=2, seed=2) == 0, 0, integers(sequences, high=180, seed=3))
    of_token = torch.repeat_interleave(torch.arange(sequences, device="cuda"), lengths)
    index = torch.arange(len(of_token), device="cuda")
    positions = (index - (last - lengths + 1)[of_token] + starts[of_token]).int()
    spare = torch.full((5,), SLOTS - 1, dtype=torch.int32, device="cuda")  # tokens and chunks of the padding slot
    places = TokenPlaces(torch.cat((positions, spare * 0)), torch.cat((slots[of_token], spare)))
    tokens = integers(len(of_token) + 5, high=min(vocab, 20), seed=4) * (vocab // 20)
    given = sampling_of(sequences + 5, seed=5)
    for name in vars(given):
        getattr(given, name)[sequences:] = 0
    rows = (
        torch.cat((column, padding)) for column, padding in ((slots, spare), (starts, spare * 0), (last, spare * 0))
    )
    chunks = Chunks(*rows, integers(sequences + 5, PAGES, seed=6), given)
    chunks.page_table[sequences:] = 0
    outs = []
    for function in (reference.install, install):
        table, state = integers(SLOTS, PAGES, seed=7), sampling_of(SLOTS, seed=8)
        counts = TokenCounts(integers(SLOTS, vocab, seed=9), integers(SLOTS, vocab, high=2, seed=10).byte())
        positions = function(chunks, tokens, places, table, state, counts)
        outs.append([positions, table, *counts, *vars(state).values()])
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 64, 256])
def test_advance(rows):
    places = TokenPlaces(integers(rows, high=PAGES * 64), rows_of(rows))
    new_pages = torch.where(integers(rows, high=2, seed=1) == 0, integers(rows, seed=2), -1)
    table, last = integers(SLOTS, PAGES, seed=3), integers(SLOTS, seed=4)
    pages = torch.zeros(1, 1, 64, 64, device="cuda")
    expected_table = table.clone()
    expected = reference.advance(places, new_pages, KvPages(pages, pages, expected_table), last)
    outs = advance(places, new_pages, KvPages(pages, pages, table), last)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert torch.equal(table, expected_table)


@pytest.mark.parametrize("rows", [1, 3, 64, 256])
@pytest.mark.parametrize("top", [1, 5, 20])
def test_emit(rows, top):
    slots, tokens = rows_of(rows), integers(rows, high=VOCAB)
    logprobs, top_logprobs = torch.randn(rows, device="cuda"), torch.randn(rows, top, device="cuda")
    sampled = Sampled(tokens, logprobs, integers(rows, top), top_logprobs)
    state = [integers(SLOTS), integers(SLOTS, VOCAB), integers(256, 42)]
    expected = [tensor.clone() for tensor in state]
    for function, (last, counts, outputs) in ((reference.emit, expected), (emit, state)):
        function(sampled, slots, last, TokenCounts(counts, counts), outputs)
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def test_rows_of_the_padding_slot_are_all_counted():
    padding = torch.full((64,), SLOTS - 1, dtype=torch.int32, device="cuda")
    tokens, counts = torch.full_like(padding, 7), torch.zeros(SLOTS, VOCAB, dtype=torch.int32, device="cuda")
    zeros = torch.zeros(64, 1, device="cuda")
    sampled = Sampled(tokens, zeros[:, 0].contiguous(), zeros.int(), zeros)
    emit(sampled, padding, integers(SLOTS), TokenCounts(counts, counts), integers(64, 42))
    assert counts[SLOTS - 1, 7] == 64
    assert counts.sum() == 64
