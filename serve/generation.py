"""Requests on their way to the engine and back: admission, and the choices of one request merged into one sequence.

Knows neither text nor the reply's format: a `Choice` turns the engine's Deltas into those of the choice.
"""

import asyncio
import datetime
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from conf.limits import VOCABULARY
from conf.schema import ServerConfig
from engine.messages import Delta, Ready
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.client import DeltaStream, Engine, EngineFailed, ServerStopped
from serve.compiler import GrammarChecker
from serve.grammar import Grammar
from serve.metrics import Meter, Metrics
from serve.protocol import SEEDS, ApiError, JsonObject, unsupported
from serve.workers import Workers

INLINE_BYTES = 4096  # requests up to this are prepared by the event loop, in a few milliseconds at most
# In a body: tools, which cost much where their schemas refer to each other, and escapes, which could spell "tools".
HEAVY = (b"tools", b"\\u")
RETRY = {"Retry-After": "1"}


class ChoiceDelta(Protocol):
    """What one Delta of the engine adds to a choice: a struct that is encoded as it is."""

    @property
    def finish_reason(self) -> str | None:
        """Set in the last."""

    @property
    def has_output(self) -> bool:
        """Whether it is worth an event of a stream."""


Result = TypeVar("Result")
AnyDelta = TypeVar("AnyDelta", bound=ChoiceDelta)
AnyDelta_co = TypeVar("AnyDelta_co", bound=ChoiceDelta, covariant=True)


class Choice(Protocol[AnyDelta_co]):
    """One answer, as it is read from the engine's Deltas. The counts are of tokens."""

    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int

    def feed(self, delta: Delta) -> AnyDelta_co:
        """What `delta` adds that a client may see. Once it has a finish_reason, no other follows."""


@dataclass(frozen=True)
class Serving:
    """What is served: all that a request is checked and rendered with. Picklable."""

    ready: Ready
    server: ServerConfig
    model_name: str
    today: datetime.date

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def require_model(self, model: str | None) -> None:
        """Raises ApiError 404 for a model that is not served; None is any."""
        require_model(model, self.model_name, self.server)


@dataclass(frozen=True)
class Service:
    """The objects that endpoints share, and the admission of requests."""

    engine: Engine
    server: ServerConfig
    model_name: str
    tokenizer: Tokenizer
    metrics: Metrics
    workers: Workers
    grammars: GrammarChecker
    draining: Callable[[], bool]
    today: Callable[[], datetime.date]

    async def prepared(
        self, request: Request, prepare: Callable[[bytes, Serving], Result], more_bytes: int = 0
    ) -> Result:
        """`prepare(body, what is served)`: all that is done with a request before the engine gets it.

        A large body, or one that may cost much, goes to a worker, so that the event loop goes on; then `prepare` and
        its result are pickled. `more_bytes`: what `prepare` reads beside the body. Raises ApiError, and
        ClientDisconnect when the client goes away.
        """
        body = await request.body()
        serving, size = self.serving(), len(body) + more_bytes
        if size <= INLINE_BYTES and not any(part in body for part in HEAVY):
            return prepare(body, serving)
        return await unless_gone(request.receive, self.workers.run(size, prepare, body, serving))

    def serving(self) -> Serving:
        """What is served now. Raises ApiError 503 while no request can be taken."""
        return Serving(self.require_ready(), self.server, self.model_name, self.today())

    def require_ready(self) -> Ready:
        """The engine's figures. Raises ApiError 503 while no request can be taken."""
        if self.engine.failure is not None:
            raise engine_failed(self.engine.failure)
        if self.draining():
            raise ApiError(503, "the server is shutting down", code="draining", headers=RETRY)
        if self.engine.ready is None:
            raise ApiError(503, "the engine is still starting", code="not_ready", headers=RETRY)
        return self.engine.ready

    async def checked(self, grammar: Grammar | None) -> str:
        """The grammar's text, empty where there is none. Raises ApiError 400 for one that cannot be held to."""
        if grammar is None:
            return ""
        if self.require_ready().vocab_size < VOCABULARY:
            place = grammar.forms[0].place
            raise unsupported(f"{place}: this model has not all tokens that forms of answers are made of", place)
        await self.grammars.check(grammar)
        return grammar.text

    def submit(
        self,
        prompts: list[tuple[list[int], SamplingParams]],
        n: int,
        choice: Callable[[int, int], Choice[AnyDelta]],
        salt: bytes,
    ) -> "Generation[AnyDelta]":
        """Start `n` choices of each prompt; `choice(index of the prompt, index of the choice)` reads one.

        Choice i of a prompt draws with seed + i. `salt` is that of `guard.cache_salt`. Raises ApiError 429 where the
        queue has no room for all of them, 503 where the engine failed.
        """
        self.require_ready()
        outstanding, new, limit = self.engine.outstanding, n * len(prompts), self.server.max_queue
        if outstanding + new > limit:
            raise ApiError(
                429,
                f"{outstanding} requests of at most {limit} are in progress, {new} more do not fit",
                code="queue_full",
                headers=RETRY,
            )
        generation: Generation[AnyDelta] = Generation(n, sum(len(ids) for ids, _ in prompts))
        try:
            for i, (ids, sampling) in enumerate(prompts):
                for j in range(n):
                    seeded = msgspec.structs.replace(sampling, seed=(sampling.seed + j) % SEEDS)
                    generation.streams.append(self.engine.submit(ids, seeded, salt))
                    generation.choices.append(choice(i, i * n + j))
                    generation.meters.append(Meter(self.metrics, len(ids)))
        except EngineFailed as error:
            raise engine_failed(error) from error
        return generation


def require_model(model: str | None, model_name: str, server: ServerConfig) -> None:
    """Raises ApiError 404 for a model that is not served; None is any."""
    if model not in (None, model_name, *server.also_named):
        message = f"the model {model!r} is not served here; {model_name!r} is"
        raise ApiError(404, message, "model", "model_not_found")


async def unless_gone(receive: Receive, work: Coroutine[object, object, Result]) -> Result:
    """The result of `work`. Raises ClientDisconnect when the client goes away first, which cancels `work`."""

    async def client_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.create_task(work), asyncio.create_task(client_gone())
    try:
        await asyncio.wait([result, gone], return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        result.cancel()
        gone.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)


def engine_failed(reason: object) -> ApiError:
    """The answer once the engine is lost."""
    return ApiError(503, f"the engine failed: {reason}", code="engine_failed", headers=RETRY)


@dataclass
class Generation(Generic[AnyDelta]):
    """The submitted choices of one request. Its owner calls `aclose` in the end, whatever happens."""

    n: int  # choices of each prompt
    prompt_tokens: int
    streams: list[DeltaStream] = field(default_factory=list)
    choices: list[Choice[AnyDelta]] = field(default_factory=list)
    meters: list[Meter] = field(default_factory=list)

    async def deltas(self) -> AsyncGenerator[tuple[int, AnyDelta], None]:
        """(index of the choice, its delta) as they arrive, until all choices have finished.

        Raises ApiError where the engine reports an error or fails.
        """
        if len(self.streams) == 1:
            async with aclosing(self._read(0)) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        # As many places as choices: where the client is slow, Deltas pile up, and merge, in the engine's streams.
        queue: asyncio.Queue[tuple[int, AnyDelta | Exception]] = asyncio.Queue(len(self.streams))
        tasks = [asyncio.create_task(self._forward(index, queue)) for index in range(len(self.streams))]
        unfinished = len(tasks)
        try:
            while unfinished:
                index, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.finish_reason is not None
                yield index, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def aclose(self) -> None:
        """Abort the choices that have not finished."""
        for stream in self.streams:
            await stream.aclose()

    def usage(self) -> JsonObject:
        """The usage object; a prompt counts once, however many choices it has."""
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in self.choices[:: self.n])},
            "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in self.choices)},
        }

    async def _forward(self, index: int, queue: "asyncio.Queue[tuple[int, AnyDelta | Exception]]") -> None:
        try:
            async with aclosing(self._read(index)) as deltas:
                async for delta in deltas:
                    await queue.put((index, delta))
        except Exception as error:
            await queue.put((index, error))

    async def _read(self, index: int) -> AsyncGenerator[AnyDelta, None]:
        """One choice's deltas. Closing it early aborts the choice."""
        stream, choice, meter = self.streams[index], self.choices[index], self.meters[index]
        reason = "abort"
        try:
            async for delta in stream:
                meter.observe(delta)
                if delta.finish_reason == "error":
                    reason = "error"
                    raise ApiError(500, delta.error or "the engine could not finish the request", code="engine_error")
                addition = choice.feed(delta)
                reason = addition.finish_reason or reason
                yield addition
                if addition.finish_reason:
                    return
        except EngineFailed as error:
            reason = "error"
            raise engine_failed(error) from error
        except ServerStopped as error:
            reason = "error"
            message = "the server was stopped before the answer was complete"
            raise ApiError(503, message, code="draining", headers=RETRY) from error
        finally:
            meter.finish(reason)
            await stream.aclose()
