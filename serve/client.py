"""The narrow seam between HTTP and the engine: submit a request, read its stream of Deltas, close the stream to abort.

The endpoints know only `Engine`; tests fake it. `EngineClient` is the real one, over ipc sockets.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from engine.messages import Abort, Delta, FromEngine, Ready, Stats, Submit
from graphs.plan import SamplingParams


class DeltaStream(Protocol):
    """What the engine generates for one request."""

    def __aiter__(self) -> "DeltaStream": ...

    async def __anext__(self) -> Delta: ...

    async def aclose(self) -> None:
        """Abort the request if it has not finished; closing twice, or after the end, does nothing."""


class Engine(Protocol):
    """The engine as the endpoints see it."""

    @property
    def ready(self) -> Ready | None:
        """The engine's message once it accepts requests; None before."""

    @property
    def failure(self) -> str | None:
        """Why the engine cannot go on: a rank died, or no step finished within the deadline. None while it can."""

    @property
    def stats(self) -> Stats:
        """The engine's state after its latest step."""

    @property
    def outstanding(self) -> int:
        """Requests submitted and not finished."""

    def submit(self, prompt: list[int], sampling: SamplingParams, salt: bytes) -> DeltaStream:
        """Start a request at once and stream its Deltas; the last one has a finish_reason.

        Prompts are found in the prefix cache only by requests of the same `salt`.

        Deltas that arrive faster than they are read are merged into one. Raises EngineFailed, here or while reading,
        once the engine is lost; ServerStopped, while reading, once the server ends.
        """


class EngineFailed(RuntimeError):
    """The engine died or hangs; the message says how."""


class ServerStopped(Exception):
    """The server ends before the request has."""


class Stream:
    """One request's Deltas as they arrive; closing it early aborts the request."""

    def __init__(self, id: int, close: Callable[[int], None]) -> None:
        self.id = id
        self._close = close
        self._deltas: list[Delta] = []
        self._failure: Exception | None = None
        self._arrived = asyncio.Event()
        self._ended = False

    def push(self, delta: Delta) -> None:
        """A Delta has arrived."""
        self._deltas.append(delta)
        self._arrived.set()

    def fail(self, failure: EngineFailed | ServerStopped) -> None:
        """No more Deltas will come; those that have arrived are read first."""
        self._failure = failure
        self._arrived.set()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        if not self._deltas:
            self._ended = True
            assert self._failure is not None
            raise self._failure
        delta, self._deltas = merged(self._deltas), []
        self._ended = delta.finish_reason is not None
        if self._failure:
            self._arrived.set()
        return delta

    async def aclose(self) -> None:
        self._ended = True
        self._close(self.id)


def merged(deltas: list[Delta]) -> Delta:
    """Consecutive Deltas of one request as one."""
    if len(deltas) == 1:
        return deltas[0]
    first, last = deltas[0], deltas[-1]
    return Delta(
        id=first.id,
        tokens=[token for delta in deltas for token in delta.tokens],
        finish_reason=last.finish_reason,
        logprobs=None if first.logprobs is None else [entry for delta in deltas for entry in delta.logprobs or []],
        cached_tokens=first.cached_tokens,
        queue_seconds=first.queue_seconds,
        error=last.error,
        prompt_logprobs=[entry for delta in deltas for entry in delta.prompt_logprobs or []] or None,
    )


class EngineClient:
    """The engine behind two ipc sockets in `run_folder`. Lives on one event loop; `run` must be running there."""

    def __init__(self, run_folder: str, step_deadline: float, on_ready: Callable[[Ready], None]) -> None:
        """`step_deadline`: seconds that may pass without a finished step while requests are outstanding."""
        context = zmq.asyncio.Context()
        self._requests, self._reports = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self._requests.setsockopt(zmq.LINGER, 0)
        self._requests.setsockopt(zmq.SNDHWM, 0)
        self._reports.setsockopt(zmq.RCVHWM, 0)
        self._requests.bind(f"ipc://{run_folder}/requests")
        self._reports.bind(f"ipc://{run_folder}/reports")
        self._deadline = step_deadline
        self._on_ready = on_ready
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._ids = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._last_progress = time.monotonic()
        self.ready: Ready | None = None
        self.failure: str | None = None
        self.stats = Stats()

    @property
    def outstanding(self) -> int:
        return len(self._streams)

    def submit(self, prompt: list[int], sampling: SamplingParams, salt: bytes = b"") -> Stream:
        if self.failure:
            raise EngineFailed(self.failure)
        if not self._streams:
            self._last_progress = time.monotonic()
        stream = Stream(next(self._ids), self._abort)
        self._streams[stream.id] = stream
        self._send(Submit(stream.id, prompt, sampling, salt))
        return stream

    def fail(self, reason: str) -> None:
        """The engine is lost: every stream ends with EngineFailed."""
        self.failure = self.failure or reason
        for stream in self._streams.values():
            stream.fail(EngineFailed(self.failure))
        self._streams.clear()

    def stop(self) -> None:
        """The server ends: every stream ends with ServerStopped."""
        for stream in self._streams.values():
            stream.fail(ServerStopped())
        self._streams.clear()

    async def run(self) -> None:
        """Deliver the engine's reports until it fails or this is cancelled. Returns with `failure` set."""
        poll = max(0.05, min(1.0, self._deadline / 4))
        while not self.failure:
            if await self._reports.poll(1000 * poll):
                self._receive(self._decode(await self._reports.recv()))
            elif self._streams and time.monotonic() - self._last_progress > self._deadline:
                self.fail(f"no step finished within {self._deadline:g} s while {self.outstanding} requests wait")

    def close(self) -> None:
        """Close both sockets; messages that the engine has not taken yet are dropped."""
        self._requests.close()
        self._reports.close()

    def _receive(self, message: FromEngine) -> None:
        self._last_progress = time.monotonic()
        if isinstance(message, Ready):
            self.ready = message
            self._on_ready(message)
            return
        self.stats = message.stats
        for delta in message.deltas:
            stream = self._streams.get(delta.id)
            if stream is None:
                continue  # aborted while this was on its way
            if delta.finish_reason is not None:
                del self._streams[delta.id]
            stream.push(delta)

    def _abort(self, id: int) -> None:
        if self._streams.pop(id, None) and not self.failure:
            self._send(Abort(id))

    def _send(self, message: Submit | Abort) -> None:
        # Never blocks: the queue has no limit of its own, server.max_queue bounds the outstanding requests.
        zmq.Socket.send(self._requests, self._encode(message), zmq.NOBLOCK)
