"""The loop over steps that take no time: what it launches, when it waits, what it hands to the other ranks."""

import pytest
import torch

from engine.core import Core
from engine.messages import StepReport, Submit
from engine.pages import PagePool
from engine.scheduler import Scheduler
from graphs.buckets import Buckets
from graphs.buffers import Buffers
from graphs.plan import SamplingParams

BUCKETS = Buckets.of([1, 2], [64], 2)


class Steps:
    """Notes launches and waits; a step's inputs must lie untouched in its staging until somebody has waited for it."""

    def __init__(self, buffers):
        self.buffers = buffers
        self.events = []

    def launch(self, bucket, staging):
        number = sum(event.startswith("launch") for event in self.events)
        words = staging.words[: self.buffers.used_words(bucket, staging)].clone()
        self.events.append(f"launch {number}")

        def wait():
            assert torch.equal(staging.words[: len(words)], words), "overwritten in flight"
            staging.outputs.fill_(number)
            self.events.append(f"wait {number}")

        return wait


@pytest.fixture
def loop():
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 2, "vocab": 8, "max_context": 256, "pages": 9}
    buffers = Buffers(buckets=BUCKETS, **shape, device=torch.device("cpu"), dtype=torch.float32)
    steps, reports = Steps(buffers), []

    def send(index, words):
        steps.events.append(f"send {index} {len(words)}")

    core = Core(Scheduler(PagePool(9), BUCKETS, 256), buffers, steps, send, reports.append)
    return core, steps, reports


def test_the_next_step_is_launched_before_the_last_one_is_waited_for(loop):
    core, steps, reports = loop
    core.handle(Submit(0, [1, 2, 3], SamplingParams(max_tokens=3, seed=0)))
    while core.turn():
        pass
    order = [event for event in steps.events if not event.startswith("send")]
    assert order == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]
    assert [report.deltas[0].tokens for report in reports] == [[0], [1], [2]]
    assert all(isinstance(report, StepReport) for report in reports)


def test_the_other_ranks_get_each_steps_bucket_and_inputs_before_it_is_launched(loop):
    core, steps, _ = loop
    for id in range(2):
        core.handle(Submit(id, [1, 2, 3], SamplingParams(max_tokens=2, seed=0)))
    while core.turn():
        pass
    prefill = steps.buffers.words_of(BUCKETS.prefill[0])
    assert [event for event in steps.events if not event.startswith("wait")] == [
        f"send 2 {prefill}",
        "launch 0",
        "send 1 8",
        "launch 1",
    ]
