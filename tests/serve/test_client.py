"""The real seam's stream: what has piled up comes merged, a lost engine is told after it, closing aborts."""

import asyncio

import pytest

from engine.messages import Delta, TokenLogprobs
from serve.client import EngineFailed, Stream, merged


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
        stream.fail("rank 1 ended")
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
