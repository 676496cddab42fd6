"""The start and the end of a step on a Hopper GPU: what the reference does, entry by entry."""

import pytest
import torch

from kernels import reference
from kernels.hopper.step import advance, emit
from kernels.ops import KvPages, Sampled, TokenCounts, TokenPlaces

pytestmark = pytest.mark.gpu
SLOTS, PAGES, VOCAB = 300, 40, 1000


def integers(*shape, high=1000, seed=0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, high, shape, generator=draw, device="cuda", dtype=torch.int32)


def rows_of(count):
    return torch.randperm(SLOTS - 1, device="cuda")[:count].int()


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
