"""A rank's process: what it reports, what ends it, and how the others follow."""

import itertools
import multiprocessing
from dataclasses import dataclass, field
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import zmq

from conf.schema import compose
from engine import rank
from engine.messages import FromEngine, Ready, StepReport, Submit
from graphs.buckets import Buckets
from graphs.plan import SamplingParams
from tests.engine.test_start import TINY

SECONDS = 60


def rank_that_fails(config, folder, step):
    """A rank 0 in whose step number `step` an error is raised."""
    real = rank.start

    def start(*arguments):
        engine, count = real(*arguments), itertools.count()
        for bucket in engine.buffers.buckets.all:
            body = engine.model.step(bucket, engine.buffers)

            def failing(body=body):
                if next(count) == step:
                    raise RuntimeError("no such kernel")
                body()

            engine.steps.capture(bucket, failing)
        return engine

    rank.start = start
    rank.run_rank(config, 0, folder)


class Http:
    """The other end of a rank 0's sockets."""

    def __init__(self, folder, step):
        self.context = zmq.Context()
        self.requests, self.reports = self.context.socket(zmq.PUSH), self.context.socket(zmq.PULL)
        self.requests.bind(f"ipc://{folder}/requests")
        self.reports.bind(f"ipc://{folder}/reports")
        config = compose([*TINY, "buckets.pages=7"])
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=rank_that_fails, args=(config, str(folder), step))
        self.process.start()

    def receive(self):
        assert self.reports.poll(SECONDS * 1000), "no report"
        return msgspec.msgpack.decode(self.reports.recv(), type=FromEngine)

    def submit(self, id, max_tokens):
        sampling = SamplingParams(max_tokens=max_tokens, seed=0)
        self.requests.send(msgspec.msgpack.encode(Submit(id, [1, 2, 3], sampling)))

    def close(self):
        self.process.kill()
        self.process.join()
        self.context.destroy(linger=0)


@pytest.fixture
def http(tmp_path, request):
    http = Http(tmp_path, request.param)
    yield http
    http.close()


@pytest.mark.parametrize("http", [4], indirect=True)
def test_rank_0_reports_every_step_and_once_more_when_it_turns_idle_and_an_error_ends_it(http):
    assert isinstance(http.receive(), Ready)
    idle = http.receive()
    assert (idle.deltas, idle.stats.running) == ([], 0)
    http.submit(0, max_tokens=3)
    reports: list[StepReport] = []
    while not reports or reports[-1].deltas:
        reports.append(http.receive())
    deltas = [delta for report in reports for delta in report.deltas]
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
    assert reports[-1].stats.running == reports[-1].stats.pages_used == 0
    http.submit(1, max_tokens=9)  # steps 3, 4, ...
    http.process.join(SECONDS)
    assert http.process.exitcode == 1


class Enough(Exception):
    """Ends a loop that has no end."""


@dataclass
class Follower:
    """Stands in for a rank's engine and its channel: notes what `_follow` does, and in which order."""

    buckets: Buckets
    events: list = field(default_factory=list)
    numbers: itertools.count = field(default_factory=itertools.count)

    @property
    def buffers(self):
        return self

    steps = buffers

    def staging(self):
        words = np.zeros(1)
        return SimpleNamespace(words=SimpleNamespace(numpy=lambda: words))

    def receive(self, words):
        number = next(self.numbers)
        if number == 5:
            raise Enough
        self.events.append(f"receive {number}")
        words[0] = number
        return number % len(self.buckets.all)

    def launch(self, bucket, staging):
        number = int(staging.words.numpy()[0])
        assert bucket == self.buckets.all[number % len(self.buckets.all)]
        self.events.append(f"launch {number}")

        def wait():
            assert staging.words.numpy()[0] == number, "overwritten in flight"
            self.events.append(f"wait {number}")

        return wait


def test_a_rank_that_follows_launches_what_it_gets_and_overwrites_no_step_in_flight():
    follower = Follower(Buckets.of([1, 2], [64], 1))
    with pytest.raises(Enough):
        rank._follow(follower, follower)
    launched = [f"{what} {n}" for n in range(5) for what in ("receive", "launch")]
    assert [event for event in follower.events if not event.startswith("wait")] == launched
    for number in range(3):  # a staging is used again two steps later
        assert follower.events.index(f"wait {number}") < follower.events.index(f"receive {number + 2}")
        assert follower.events.index(f"wait {number}") > follower.events.index(f"launch {number + 1}")
