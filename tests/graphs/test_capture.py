"""Steps on a CPU: in order, without waiting, and no error is lost."""

import threading

import pytest
import torch

from graphs.buckets import Buckets
from graphs.buffers import Buffers
from graphs.capture import EagerSteps
from graphs.plan import NO_PAGE, Chunk, DecodeStep, PrefillStep, SamplingParams

BUCKETS = Buckets.of([1, 4], [64], 2, [64])
ONE, FOUR = BUCKETS.decode


@pytest.fixture
def buffers():
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 2, "vocab": 8, "max_context": 64, "pages": 2}
    return Buffers(buckets=BUCKETS, **shape, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def steps(buffers):
    return EagerSteps(buffers, 1)


def staging_of(buffers, bucket, slot):
    staging = buffers.staging()
    buffers.fill(DecodeStep([slot], [5], [NO_PAGE]), bucket, staging)
    return staging


def test_a_step_takes_its_inputs_to_the_device_and_its_outputs_back(buffers, steps):
    def body():
        buffers.outputs[:4, 0] = buffers.inputs[FOUR].slots + 10

    steps.capture(FOUR, body)
    buffers.outputs.fill_(-1)
    staging = staging_of(buffers, FOUR, slot=2)
    steps.launch(FOUR, staging)()
    assert staging.outputs[:4, 0].tolist() == [12, 14, 14, 14]


def test_scores_come_back_where_the_bucket_scores_and_nowhere_else(buffers, steps):
    sampling = SamplingParams(max_tokens=1, seed=0)
    for bucket, targets in ((BUCKETS.score[0], [7]), (BUCKETS.prefill[0], [])):
        steps.capture(bucket, lambda: None)
        buffers.scores.fill_(5)
        staging = buffers.staging()
        buffers.fill(PrefillStep([Chunk(0, [1, 2], 0, 2, [1], True, sampling, targets)]), bucket, staging)
        steps.launch(bucket, staging)()
        assert bool((staging.scores == 5).all()) == bool(targets)


def test_launches_return_at_once_and_run_in_order(buffers, steps):
    go, order = threading.Event(), []

    def first():
        go.wait(30)
        order.append(("first", int(buffers.inputs[ONE].slots[0])))

    steps.capture(ONE, first)
    steps.capture(FOUR, lambda: order.append(("second", int(buffers.inputs[FOUR].slots[0]))))
    waits = [steps.launch(ONE, staging_of(buffers, ONE, 3)), steps.launch(FOUR, staging_of(buffers, FOUR, 1))]
    assert order == []
    go.set()
    for wait in reversed(waits):
        wait()
    assert order == [("first", 3), ("second", 1)]


def test_an_error_in_a_step_reaches_who_waits_for_it(buffers, steps):
    def body():
        raise RuntimeError("no such kernel")

    steps.capture(ONE, body)
    wait = steps.launch(ONE, staging_of(buffers, ONE, 0))
    with pytest.raises(RuntimeError, match="no such kernel"):
        wait()
