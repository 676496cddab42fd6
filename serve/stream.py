"""Parts to bytes: the collected reply, server-sent events, deadlines, and a client that goes away.

Knows ASGI and JSON, nothing of what the parts say.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.generation import Generation, Part
from serve.protocol import ApiError

log = logging.getLogger(__name__)
Result = TypeVar("Result")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None when the client goes away first, and `work` is cancelled then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collected(generation: Generation[Part], seconds: float, receive: Receive) -> list[list[Part]] | None:
    """All parts by choice, or None when the client went away. Raises ApiError, 504 after `seconds`."""

    async def collect() -> list[list[Part]]:
        parts: list[list[Part]] = [[] for _ in generation.streams]
        async with asyncio.timeout(seconds), aclosing(generation.parts()) as arriving:
            async for index, part in arriving:
                parts[index].append(part)
        return parts

    try:
        return await unless_gone(receive, collect())
    except TimeoutError:
        raise timed_out(seconds) from None
    finally:
        await generation.aclose()


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than {seconds:g} s", code="timeout")


class EventFormat:
    """The bytes of one request's events; what does not change is encoded once."""

    def __init__(self, constant: dict[str, Any], include_usage: bool) -> None:
        self.include_usage = include_usage
        self._head = b"data: " + msgspec.json.encode(constant)[:-1] + b',"choices":['
        self._usage = b',"usage":null' if include_usage else b""  # as OpenAI: null in every event but the last
        self._tail = b"]" + self._usage + b"}\n\n"
        self._encode = msgspec.json.Encoder().encode

    def event(self, choice: msgspec.Struct, beside: dict[str, Any] | None = None) -> bytes:
        """`beside`: fields next to `choices`."""
        if beside:
            return self._head + self._encode(choice) + b"]" + self._usage + b"," + self._encode(beside)[1:] + b"\n\n"
        return self._head + self._encode(choice) + self._tail

    def usage(self, usage: dict[str, Any]) -> bytes:
        return self._head + b'],"usage":' + self._encode(usage) + b"}\n\n"


class EventStream(Response):
    """A response of server-sent events, lean because it runs once per token.

    A complete answer ends with `data: [DONE]`. One that fails midway ends with an event that holds the error object,
    and without [DONE]: who sees [DONE] has everything. A client that goes away aborts the generation.
    """

    def __init__(
        self, generation: Generation[Any], form: EventFormat, opening: bytes, seconds: float, headers: dict[str, str]
    ) -> None:
        """`opening`: events that stand before the first token; `seconds` until the stream ends with an error."""
        self._generation, self._form, self._opening, self._seconds = generation, form, opening, seconds
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers({"cache-control": "no-cache", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._run(send))
        finally:
            await self._generation.aclose()

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._seconds), aclosing(self._generation.parts()) as parts:
                await send({"type": "http.response.body", "body": self._opening, "more_body": True})
                async for _, part in parts:
                    if part.tells:
                        await send({"type": "http.response.body", "body": self._form.event(part), "more_body": True})
            last = self._form.usage(self._generation.usage()) if self._form.include_usage else b""
            last += b"data: [DONE]\n\n"
        except Exception as error:
            last = b"data: " + self._told(error).body() + b"\n\n"
        await send({"type": "http.response.body", "body": last})

    def _told(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            return timed_out(self._seconds)
        if isinstance(error, ApiError):
            return error
        log.error("a stream failed", exc_info=error)
        return ApiError(500, "internal error")
