"""Load: users who wait for their answers (closed loop), or arrivals that wait for nobody (open loop).

Everything a figure needs is written down as it happens and computed afterwards, in `measure`. Does not know HTTP:
`send` brings a request's tokens.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from sweep.workload import Request

Send = Callable[[Request], AsyncIterator[int]]  # -> numbers of tokens, as they arrive


class SendError(RuntimeError):
    """A request that failed; the message says how."""


@dataclass
class Record:
    """One request; times are the event loop's, in seconds."""

    intended: float  # when it was due. Latencies count from here: a late client must not flatter the server
    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # that came with each arrival
    error: str | None = None


@dataclass
class Run:
    """One repeat. Rates are taken over `begin` to `end`, while the load is whole: in a closed loop every user busy."""

    records: list[Record]
    begin: float
    end: float


class OnDone(Protocol):
    def __call__(self, record: Record) -> None: ...


async def closed(send: Send, requests: list[Request], users: int, seconds: float, stall: float, on_done: OnDone) -> Run:
    """`users` take the next request as soon as their last is answered, until none is left or `seconds` are over."""
    now = asyncio.get_running_loop().time
    begin, left, records = now(), iter(requests), []
    end: float | None = None

    async def user() -> None:
        nonlocal end
        while now() < begin + seconds and (request := next(left, None)):
            records.append(record := Record(now(), now()))
            await _follow(send, request, record, stall)
            on_done(record)
        end = now() if end is None else end

    await _together([user() for _ in range(users)])
    return Run(records, begin, begin if end is None else end)


async def opened(send: Send, requests: list[Request], arrivals: list[float], stall: float, on_done: OnDone) -> Run:
    """Each request at its time, however many are under way."""
    now = asyncio.get_running_loop().time
    begin, records = now(), []

    async def one(request: Request, due: float) -> None:
        await asyncio.sleep(due - now())
        records.append(record := Record(due, now()))
        await _follow(send, request, record, stall)
        on_done(record)

    await _together([one(request, begin + at) for request, at in zip(requests, arrivals, strict=True)])
    return Run(records, begin, max((record.arrivals or [record.sent])[-1] for record in records))


async def _together(tasks: list) -> None:
    async with asyncio.TaskGroup() as group:
        for task in tasks:
            group.create_task(task)


async def _follow(send: Send, request: Request, record: Record, stall: float) -> None:
    """Write down what a request brings. An error is its record's, never the load's."""
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(stall) as patience, aclosing(send(request)) as stream:
            async for tokens in stream:
                record.arrivals.append(now())
                record.tokens.append(tokens)
                patience.reschedule(now() + stall)
        if sum(record.tokens) != request.output_tokens:
            record.error = f"{sum(record.tokens)} tokens came, {request.output_tokens} were asked for"
    except TimeoutError:
        record.error = f"nothing came for {stall:g} s"
    except SendError as error:
        record.error = str(error)
