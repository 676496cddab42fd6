"""The start and the end of a step on a Hopper GPU: what the reference does, entry by entry."""

import pytest
import torch

from kernels import reference
from kernels.hopper.step import advance, emit

pytestmark = pytest.mark.gpu
SLOTS, PAGES, VOCAB = 300, 40, 1000


def integers(*shape, high=1000, seed=0):
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, high, shape, generator=draw, device="cuda", dtype=torch.int32)


def rows_of(count):
    return torch.randperm(SLOTS - 1, device="cuda")[:count].int()


@pytest.mark.parametrize("rows", [1, 3, 64, 256])
def test_advance(rows):
    slots, positions = rows_of(rows), integers(rows, high=PAGES * 64)
    new_pages = torch.where(integers(rows, high=2, seed=1) == 0, integers(rows, seed=2), -1)
    table, last = integers(SLOTS, PAGES, seed=3), integers(SLOTS, seed=4)
    expected_table = table.clone()
    expected = reference.advance(slots, positions, new_pages, expected_table, last)
    found = advance(slots, positions, new_pages, table, last)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(table, expected_table)


@pytest.mark.parametrize("rows", [1, 3, 64, 256])
@pytest.mark.parametrize("top", [1, 5, 20])
def test_emit(rows, top):
    slots, tokens = rows_of(rows), integers(rows, high=VOCAB)
    drawn = (tokens, torch.randn(rows, device="cuda"), integers(rows, top), torch.randn(rows, top, device="cuda"))
    state = [integers(SLOTS), integers(SLOTS, VOCAB), integers(256, 42)]
    expected = [tensor.clone() for tensor in state]
    reference.emit(slots, *drawn, *expected)
    emit(slots, *drawn, *state)
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def test_rows_of_one_spare_slot_are_all_counted():
    spare = torch.full((64,), SLOTS - 1, dtype=torch.int32, device="cuda")
    tokens, counts = torch.full_like(spare, 7), torch.zeros(SLOTS, VOCAB, dtype=torch.int32, device="cuda")
    zeros = torch.zeros(64, 1, device="cuda")
    emit(spare, tokens, zeros[:, 0].contiguous(), zeros.int(), zeros, integers(SLOTS), counts, integers(64, 42))
    assert counts[SLOTS - 1, 7] == 64
    assert counts.sum() == 64
