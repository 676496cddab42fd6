"""Requests on their way to the engine and back: admission, and the choices of one request merged into one sequence.

Knows neither text nor the reply's format: a `Choice` turns what the engine says into parts.
"""

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from conf.schema import ServerConfig
from engine.messages import Delta, FinishReason, Ready
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.client import Deltas, Engine, EngineFailed
from serve.metrics import Meter, Metrics
from serve.protocol import SEEDS, ApiError

INLINE_BYTES = 32768  # bodies up to this encode in well under 10 ms; larger ones leave the event loop to the others
RETRY = {"Retry-After": "1"}
Result = TypeVar("Result")


class AnyPart(Protocol):
    """What one Delta adds to a choice."""

    finish_reason: FinishReason | None  # set in the last

    @property
    def tells(self) -> bool:
        """Whether a client that streams is to hear of it."""


Part = TypeVar("Part", bound=AnyPart)


class Choice(Protocol[Part]):
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int

    def feed(self, delta: Delta) -> Part:
        """What the client may see after `delta`. With a finish_reason it is the last."""


@dataclass(frozen=True)
class Service:
    """What every endpoint needs."""

    engine: Engine
    server: ServerConfig
    model_name: str
    tokenizer: Tokenizer
    metrics: Metrics
    draining: Callable[[], bool]
    today: Callable[[], datetime.date]

    def accepting(self, model: str | None = None) -> Ready:
        """Raises ApiError 503 while no request can be taken, 404 for a `model` that is not served."""
        if self.engine.failure is not None:
            raise engine_failed(self.engine.failure)
        if self.draining():
            raise ApiError(503, "the server is shutting down", code="draining", headers=RETRY)
        if self.engine.ready is None:
            raise ApiError(503, "the engine is still starting", code="not_ready", headers=RETRY)
        if model is not None and model != self.model_name:
            raise ApiError(
                404, f"the model {model!r} is not served here; {self.model_name!r} is", "model", "model_not_found"
            )
        return self.engine.ready

    async def encoded(self, size: int, work: Callable[..., Result], *args: Any) -> Result:
        """`work(*args)`, beside the event loop where the body of `size` bytes makes it long."""
        return work(*args) if size <= INLINE_BYTES else await asyncio.to_thread(work, *args)

    def submit(
        self, prompts: list[tuple[list[int], SamplingParams]], n: int, choice: Callable[[int, int], Choice[Part]]
    ) -> "Generation[Part]":
        """Start `n` choices of each prompt; `choice(prompt index, index)` reads one. Choice i of a prompt draws with
        seed + i. Raises ApiError 429 where the queue has no room for all of them, 503 where the engine failed."""
        self.accepting()
        waiting, wanted, limit = self.engine.outstanding, n * len(prompts), self.server.max_queue
        if waiting + wanted > limit:
            raise ApiError(
                429,
                f"{waiting} requests of at most {limit} are in progress, {wanted} more do not fit",
                code="queue_full",
                headers=RETRY,
            )
        generation: Generation[Part] = Generation(n, sum(len(ids) for ids, _ in prompts))
        try:
            for i, (ids, sampling) in enumerate(prompts):
                for j in range(n):
                    seeded = msgspec.structs.replace(sampling, seed=(sampling.seed + j) % SEEDS)
                    generation.streams.append(self.engine.submit(ids, seeded))
                    generation.choices.append(choice(i, i * n + j))
                    generation.meters.append(Meter(self.metrics, len(ids)))
        except EngineFailed as error:
            raise engine_failed(error) from error
        return generation


def engine_failed(reason: object) -> ApiError:
    return ApiError(503, f"the engine failed: {reason}", code="engine_failed", headers=RETRY)


@dataclass
class Generation(Generic[Part]):
    """The submitted choices of one request. Whoever holds it closes it, whatever happens."""

    n: int
    prompt_tokens: int
    streams: list[Deltas] = field(default_factory=list)
    choices: list[Choice[Part]] = field(default_factory=list)
    meters: list[Meter] = field(default_factory=list)

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """(index of the choice, part) as they come, until all have finished.

        Raises ApiError where the engine reports an error or fails.
        """
        if len(self.streams) == 1:
            async with aclosing(self._one(0)) as parts:
                async for part in parts:
                    yield 0, part
            return
        # As many places as choices: a reader that is slow leaves Deltas to pile up, and merge, in the engine's streams.
        queue: asyncio.Queue[tuple[int, Part | Exception]] = asyncio.Queue(len(self.streams))
        tasks = [asyncio.create_task(self._pull(index, queue)) for index in range(len(self.streams))]
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
        """Abort what has not finished."""
        for stream in self.streams:
            await stream.aclose()

    def usage(self) -> dict[str, Any]:
        """The usage object; a prompt counts once, however many choices it has."""
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in self.choices[:: self.n])},
            "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in self.choices)},
        }

    async def _pull(self, index: int, queue: "asyncio.Queue[tuple[int, Part | Exception]]") -> None:
        try:
            async with aclosing(self._one(index)) as parts:
                async for part in parts:
                    await queue.put((index, part))
        except Exception as error:
            await queue.put((index, error))

    async def _one(self, index: int) -> AsyncIterator[Part]:
        stream, choice, meter = self.streams[index], self.choices[index], self.meters[index]
        reason = "abort"
        try:
            async for delta in stream:
                meter.observe(delta)
                if delta.finish_reason == "error":
                    reason = "error"
                    raise ApiError(500, delta.error or "the engine could not finish the request", code="engine_error")
                part = choice.feed(delta)
                reason = part.finish_reason or reason
                yield part
                if part.finish_reason:
                    return
        except EngineFailed as error:
            reason = "error"
            raise engine_failed(error) from error
        finally:
            meter.finish(reason)
            await stream.aclose()
