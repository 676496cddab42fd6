"""Load: users who wait for their answers (closed loop), or arrivals at given times (open loop).

Records the times from which `measure` computes figures afterwards. Does not know HTTP: a `Send` streams a request's
tokens.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from sweep.workload import Request

Send = Callable[[Request], AsyncGenerator[int, None]]  # yields the number of tokens in each arrival


class SendError(RuntimeError):
    """A request that failed; the message says why."""


@dataclass
class Record:
    """One request; times are the event loop's, in seconds."""

    intended: float  # when it was due. Latencies count from here, so that a client that sends late hides no delay
    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # number of tokens in each arrival
    error: str | None = None
    first: bool = False  # of its user in a closed loop: the others start at about that time too


@dataclass
class Run:
    """One repeat. Rates are taken from `begin` to `end`, the time of full load: in a closed loop all users are busy."""

    records: list[Record]
    begin: float
    end: float
    opened: bool = False


class OnDone(Protocol):
    """Called with each record once its request has ended."""

    def __call__(self, record: Record) -> None: ...


async def closed(
    send: Send, requests: list[Request], users: int, seconds: float, stall: float, on_done: OnDone, stagger: float = 0.0
) -> Run:
    """Each user sends the next request as soon as the last one has ended, until none is left or `seconds` are over.

    Users start `stagger` seconds after each other. A request that brings nothing for `stall` seconds has failed.
    """
    now = asyncio.get_running_loop().time
    begin, remaining = now(), iter(requests)
    records: list[Record] = []
    end: float | None = None

    async def user(number: int) -> None:
        nonlocal end
        await asyncio.sleep(number * stagger)
        first = True
        while now() < begin + seconds and (request := next(remaining, None)):
            records.append(record := Record(now(), now(), first=first))
            first = False
            await _follow(send, request, record, stall)
            on_done(record)
        end = now() if end is None else end

    await _together([user(number) for number in range(users)])
    return Run(records, begin + (users - 1) * stagger, begin if end is None else end)


async def opened(send: Send, requests: list[Request], arrivals: list[float], stall: float, on_done: OnDone) -> Run:
    """Each request is sent at its time (seconds from the start), however many are in progress."""
    now = asyncio.get_running_loop().time
    begin = now()
    records: list[Record] = []

    async def one(request: Request, due: float) -> None:
        await asyncio.sleep(due - now())
        records.append(record := Record(due, now()))
        await _follow(send, request, record, stall)
        on_done(record)

    await _together([one(request, begin + at) for request, at in zip(requests, arrivals, strict=True)])
    return Run(records, begin, max(((record.arrivals or [record.sent])[-1] for record in records), default=begin), True)


async def _together(coroutines: list[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)


async def _follow(send: Send, request: Request, record: Record, stall: float) -> None:
    """Record a request's arrivals. Its failure is noted in the record and ends nothing else."""
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(stall) as timeout, aclosing(send(request)) as stream:
            async for tokens in stream:
                record.arrivals.append(now())
                record.tokens.append(tokens)
                timeout.reschedule(now() + stall)
        if sum(record.tokens) != request.output_tokens:
            record.error = f"{sum(record.tokens)} tokens came, {request.output_tokens} were asked for"
    except TimeoutError:
        record.error = f"nothing came for {stall:g} s"
    except SendError as error:
        record.error = str(error)
