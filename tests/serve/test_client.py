"""The real client of the engine: Deltas that pile up are merged, a lost engine ends every stream, closing aborts."""

import asyncio
import contextlib

import msgspec
import pytest
import zmq
import zmq.asyncio

from engine.messages import Abort, Delta, SamplingParams, Stats, StepReport, Submit, ToEngine, TokenLogprobs
from serve.client import EngineClient, EngineFailed, Stream, merged
from tests.fakes import ready

SAMPLING = SamplingParams(max_tokens=8, seed=0)


def logprob(value):
    return TokenLogprobs(value, [1], [value])


def test_merged_deltas_are_one_with_everything_in_order():
    parts = [
        Delta(7, [1], None, [logprob(-1.0)], cached_tokens=64, queue_seconds=0.5),
        Delta(7, [2], None, [logprob(-2.0)]),
        Delta(7, [3, 4], "length", [logprob(-3.0), logprob(-4.0)]),
    ]
    whole = Delta(7, [1, 2, 3, 4], "length", [logprob(-n) for n in (1.0, 2.0, 3.0, 4.0)], 64, 0.5)
    assert merged(parts) == whole
    assert merged(parts[:1]) is parts[0]


def test_a_stream_gives_what_piled_up_and_ends_with_its_finish_reason():
    async def read():
        stream = Stream(7, lambda id: None)
        stream.push(Delta(7, [1]))
        stream.push(Delta(7, [2]))
        first = await anext(stream)
        stream.push(Delta(7, [3], "stop"))
        return [first, *[delta async for delta in stream]]

    assert asyncio.run(read()) == [Delta(7, [1, 2]), Delta(7, [3], "stop")]


def test_tokens_that_arrived_before_the_engine_was_lost_come_first():
    async def read():
        stream = Stream(7, lambda id: None)
        stream.push(Delta(7, [1]))
        stream.fail(EngineFailed("rank 1 ended"))
        assert await anext(stream) == Delta(7, [1])
        with pytest.raises(EngineFailed, match="rank 1 ended"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(read())


def test_closing_names_the_request_to_abort_and_ends_the_stream():
    closed = []

    async def close():
        stream = Stream(7, closed.append)
        await stream.aclose()
        return [delta async for delta in stream]

    assert asyncio.run(close()) == []
    assert closed == [7]


# --- over sockets, an engine played by the test at the other end ---


class FarEnd:
    """The engine's sockets."""

    def __init__(self, folder):
        context = zmq.asyncio.Context()
        self.requests, self.reports = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        self.requests.connect(f"ipc://{folder}/requests")
        self.reports.connect(f"ipc://{folder}/reports")

    def close(self):
        self.requests.close(0)
        self.reports.close(0)

    async def receive(self):
        return msgspec.msgpack.decode(await asyncio.wait_for(self.requests.recv(), 5), type=ToEngine)

    async def send(self, message):
        await self.reports.send(msgspec.msgpack.encode(message))

    async def report(self, *deltas):
        await self.send(StepReport(list(deltas), Stats(running=len(deltas))))


def over_sockets(folder, scenario, step_deadline=60.0):
    """Runs `scenario(client, far end)` with the client's `run` beside it."""

    async def play():
        client = EngineClient(str(folder), step_deadline, lambda ready: None)
        delivery, far = asyncio.create_task(client.run()), FarEnd(folder)
        try:
            assert await client._requests.poll(5000, zmq.POLLOUT), "not connected"
            await asyncio.wait_for(scenario(client, far), 20)
        finally:
            delivery.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await delivery
            client.close()
            far.close()

    asyncio.run(play())


def test_requests_go_out_and_their_deltas_come_back(tmp_path):
    async def scenario(client, far):
        assert client.ready is None
        first, second = client.submit([1, 2], SAMPLING), client.submit([3], SAMPLING)
        assert [await far.receive(), await far.receive()] == [Submit(0, [1, 2], SAMPLING), Submit(1, [3], SAMPLING)]
        await far.send(ready())
        await far.report(Delta(1, [7]), Delta(0, [5], "length"))
        assert [delta async for delta in first] == [Delta(0, [5], "length")]
        assert await anext(second) == Delta(1, [7])
        assert (client.ready, client.stats, client.outstanding) == (ready(), Stats(running=2), 1)
        await second.aclose()

    over_sockets(tmp_path, scenario)


def test_closing_early_aborts_once_and_later_deltas_are_dropped(tmp_path):
    async def scenario(client, far):
        closed, other = client.submit([1], SAMPLING), client.submit([2], SAMPLING)
        await closed.aclose()
        await closed.aclose()
        await far.report(Delta(0, [5]), Delta(1, [6], "length"))
        assert [delta async for delta in other] == [Delta(1, [6], "length")]
        await other.aclose()  # has finished: nothing to abort
        client.submit([3], SAMPLING)
        messages = [await far.receive() for _ in range(4)]
        assert messages[2:] == [Abort(0), Submit(2, [3], SAMPLING)]

    over_sockets(tmp_path, scenario)


def test_an_engine_that_reports_nothing_within_the_deadline_is_lost(tmp_path):
    async def scenario(client, far):
        await asyncio.sleep(0.5)  # idle for longer than the deadline is no failure
        stream = client.submit([1], SAMPLING)
        await asyncio.sleep(0.15)
        assert client.failure is None
        with pytest.raises(EngineFailed, match=r"no step finished within 0\.3 s while 1 requests wait"):
            await anext(stream)
        with pytest.raises(EngineFailed, match="no step finished"):
            client.submit([1], SAMPLING)

    over_sockets(tmp_path, scenario, step_deadline=0.3)
