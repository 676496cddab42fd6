"""Replies to bytes: a JSON body, collected choices, server-sent events, deadlines, and a client that goes away.

Knows ASGI and JSON, nothing of what a choice's deltas mean.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.generation import AnyDelta, ChoiceDelta, Generation, unless_gone
from serve.protocol import ApiError, JsonObject, SamplingRequest

log = logging.getLogger(__name__)
AnyDelta_contra = TypeVar("AnyDelta_contra", bound=ChoiceDelta, contravariant=True)


def json_response(body: JsonObject, headers: dict[str, str] | None = None) -> Response:
    """A reply with the status 200."""
    return encoded_response(msgspec.json.encode(body), headers)


def encoded_response(body: bytes, headers: dict[str, str] | None = None) -> Response:
    """A reply with the status 200, of what is JSON already."""
    return Response(body, media_type="application/json", headers=headers)


async def collected(generation: Generation[AnyDelta], seconds: float, receive: Receive) -> list[list[AnyDelta]]:
    """All deltas by choice. Raises ApiError, 504 after `seconds`, and ClientDisconnect when the client goes away."""

    async def collect() -> list[list[AnyDelta]]:
        by_choice: list[list[AnyDelta]] = [[] for _ in generation.streams]
        async with asyncio.timeout(seconds), aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                by_choice[index].append(delta)
        return by_choice

    try:
        return await unless_gone(receive, collect())
    except TimeoutError:
        raise timed_out(seconds) from None
    finally:
        await generation.aclose()


def timed_out(seconds: float) -> ApiError:
    """The answer to a request that was not finished in time."""
    return ApiError(504, f"the request took longer than {seconds:g} s", code="timeout")


class StreamFormat(Protocol[AnyDelta_contra]):
    """The bytes of a stream's events."""

    def event(self, delta: AnyDelta_contra) -> bytes:
        """What a choice's delta becomes."""

    def last(self, usage: JsonObject) -> bytes:
        """The end of a complete answer; `usage` as `Generation.usage` returns it."""

    def error(self, error: ApiError) -> bytes:
        """The end of an answer that fails midway."""


class EventFormat:
    """The events of OpenAI's older endpoints; the fields that all events of a request have are encoded once.

    A complete answer ends with `data: [DONE]`. One that fails midway ends with an event that holds the error object,
    and without [DONE].
    """

    def __init__(self, constant: JsonObject, request: SamplingRequest, usage: Callable[[], JsonObject]) -> None:
        """`constant`: the fields before `choices`. With `include_usage`, the last event has the usage; the others have
        null, or with `continuous_usage_stats` what `usage` returns: the usage so far.
        """
        self._include_usage = request.include_usage
        self._usage_so_far = usage if request.continuous_usage else None
        self._head = b"data: " + msgspec.json.encode(constant)[:-1] + b',"choices":['
        self._usage = b',"usage":null' if self._include_usage else b""
        self._encode = msgspec.json.Encoder().encode

    def event(self, delta: ChoiceDelta, extra: JsonObject | None = None) -> bytes:
        """The event of one choice's delta; `extra`: fields after `choices`."""
        usage = b',"usage":' + self._encode(self._usage_so_far()) if self._usage_so_far else self._usage
        fields = b"," + self._encode(extra)[1:] if extra else b"}"
        return self._head + self._encode(delta) + b"]" + usage + fields + b"\n\n"

    def last(self, usage: JsonObject) -> bytes:
        """The usage, where it is wanted, and [DONE]."""
        event = self._head + b'],"usage":' + self._encode(usage) + b"}\n\n" if self._include_usage else b""
        return event + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        """The error object."""
        return b"data: " + error.body() + b"\n\n"


class TypedEvents(msgspec.Struct):
    """What one Delta of the engine adds: events with a field `type`, each as it is encoded."""

    events: list[JsonObject]
    finish_reason: str | None

    @property
    def has_output(self) -> bool:
        return bool(self.events)


class TypedFormat:
    """Events that carry their type twice: in the line `event`, and in their JSON."""

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder().encode

    def event(self, delta: TypedEvents) -> bytes:
        """The events of one Delta."""
        return b"".join(map(self.line, delta.events))

    def line(self, event: JsonObject) -> bytes:
        """One event's bytes."""
        return b"event: " + str(event["type"]).encode() + b"\ndata: " + self._encode(event) + b"\n\n"


class EventStream(Response, Generic[AnyDelta]):
    """A response of server-sent events, lean because it runs once per token.

    A client that goes away aborts the generation.
    """

    def __init__(
        self,
        generation: Generation[AnyDelta],
        form: StreamFormat[AnyDelta],
        opening: bytes,
        seconds: float,
        headers: dict[str, str],
    ) -> None:
        """`opening`: the events before the first token. `seconds`: until the stream ends with an error."""
        self._generation, self._form, self._opening, self._seconds = generation, form, opening, seconds
        self._name = ""  # of the request, in the log
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers({"cache-control": "no-cache", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._name = f"{scope['request_id']}: {scope['method']} {scope['path']}"
        try:
            await unless_gone(receive, self._run(send))
        finally:
            await self._generation.aclose()

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._seconds), aclosing(self._generation.deltas()) as deltas:
                await send({"type": "http.response.body", "body": self._opening, "more_body": True})
                async for _, delta in deltas:
                    if delta.has_output:
                        await send({"type": "http.response.body", "body": self._form.event(delta), "more_body": True})
            last = self._form.last(self._generation.usage())
        except Exception as error:
            last = self._form.error(self._api_error(error))
        await send({"type": "http.response.body", "body": last})

    def _api_error(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            return timed_out(self._seconds)
        if isinstance(error, ApiError):
            return error
        log.error("%s failed", self._name, exc_info=error)
        return ApiError(500, "internal error")
