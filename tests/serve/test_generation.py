"""The choices of one request, merged into one sequence."""

import asyncio

from engine.messages import Delta
from serve.generation import Generation
from serve.metrics import Meter, Metrics
from tests.fakes import FakeEngine


class Endless:
    """A stream that always has a Delta, and counts those that were read."""

    def __init__(self):
        self.read, self.closed = 0, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        self.read += 1
        return Delta(0, [self.read])

    async def aclose(self):
        self.closed = True


class Echo:
    """A choice whose deltas are the engine's."""

    completion_tokens = reasoning_tokens = cached_tokens = 0

    def feed(self, delta):
        return delta


def test_a_slow_reader_leaves_deltas_in_the_engines_streams():
    """There they merge, so that a client that reads slowly costs no memory."""
    metrics = Metrics(FakeEngine([]), "model")
    streams = [Endless() for _ in range(3)]
    generation = Generation(3, 1, streams, [Echo() for _ in streams], [Meter(metrics, 1) for _ in streams])

    async def read_one():
        deltas = generation.deltas()
        await anext(deltas)
        for _ in range(1000):
            await asyncio.sleep(0)
        await deltas.aclose()

    asyncio.run(read_one())
    assert sum(stream.read for stream in streams) <= 3 * 3
    assert all(stream.closed for stream in streams)
