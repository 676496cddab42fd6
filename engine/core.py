"""The only loop: plan, choose a bucket, load, replay, collect, publish.

The host plans and launches step n+1 while step n runs, and only then waits for n's tokens. Knows requests and steps;
never sees text.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.messages import (
    Abort,
    BucketStats,
    Delta,
    FromEngine,
    PromptLogprobs,
    Stats,
    StepReport,
    ToEngine,
    TokenLogprobs,
)
from engine.scheduler import Scheduled, Scheduler
from graphs.buckets import Bucket
from graphs.buffers import Buffers, Sampled, Scores, Staging
from graphs.capture import Steps, Wait

Send = Callable[[int, npt.NDArray[np.int32]], None]


class Launched(NamedTuple):
    """A step in flight."""

    scheduled: Scheduled
    bucket: Bucket
    staging: Staging
    wait: Wait


class Core:
    """Rank 0's loop body: one step is in flight while the next is planned."""

    def __init__(
        self,
        scheduler: Scheduler,
        buffers: Buffers,
        steps: Steps,
        send: Send | None,
        publish: Callable[[FromEngine], None],
    ) -> None:
        """`send` hands a bucket's index and packed inputs to the other ranks, None where there are none.

        `publish` takes what the engine reports.
        """
        self.scheduler = scheduler
        self._buffers = buffers
        self._steps = steps
        self._send = send
        self._publish = publish
        self._stagings = (buffers.staging(), buffers.staging())
        self._in_flight: Launched | None = None
        self._turn = 0
        self._index = {bucket: index for index, bucket in enumerate(buffers.buckets.all)}
        self._used = [[0, 0] for _ in self._index]  # steps and rows used, by bucket

    def handle(self, message: ToEngine) -> None:
        """Take in a message. A request that can never run is answered at once, with an error."""
        if isinstance(message, Abort):
            self.scheduler.abort(message.id)
            return
        try:
            self.scheduler.add(message, time.monotonic())
        except ValueError as error:
            self._publish(StepReport([Delta(message.id, [], "error", error=str(error))], self.stats()))

    def turn(self) -> bool:
        """Launch the next step if there is one, then collect the one before. False when there was nothing to do."""
        scheduled = self.scheduler.schedule(time.monotonic())
        launched = self._launch(scheduled) if scheduled else None
        collected, self._in_flight = self._in_flight, launched
        if collected:
            self._collect(collected)
        return bool(launched or collected)

    def _launch(self, scheduled: Scheduled) -> Launched:
        step = scheduled.step
        bucket = self._buffers.buckets.choose(step.kind, step.tokens)
        staging = self._stagings[self._turn % 2]  # the other one belongs to the step in flight
        self._turn += 1
        self._buffers.fill(step, bucket, staging)
        index = self._index[bucket]
        if self._send:
            self._send(index, staging.words[: self._buffers.words_of(bucket)].numpy())
        self._used[index][0] += 1
        self._used[index][1] += step.tokens
        return Launched(scheduled, bucket, staging, self._steps.launch(bucket, staging))

    def _collect(self, launched: Launched) -> None:
        launched.wait()
        rows = launched.scheduled.rows
        sampled = self._buffers.sampled(launched.staging, len(rows))
        scores = self._buffers.scored(launched.staging)
        deltas = self.scheduler.update(
            launched.scheduled,
            sampled.tokens,
            lambda row, count: _logprobs(sampled, row, count),
            lambda token, count: _prompt_logprobs(scores, token, count),
        )
        self._publish(StepReport(deltas, self.stats()))

    def stats(self) -> Stats:
        """The engine's state now."""
        scheduler = self.scheduler
        return Stats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            pages_used=scheduler.pool.used,
            pages_total=scheduler.pool.total,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            buckets=[
                BucketStats(bucket.kind, bucket.tokens, steps, used, steps * bucket.tokens - used)
                for bucket, (steps, used) in zip(self._index, self._used, strict=True)
            ],
        )


def _logprobs(sampled: Sampled, row: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(
        float(sampled.logprobs[row]), sampled.top_ids[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist()
    )


def _prompt_logprobs(scores: Scores, token: int, count: int) -> PromptLogprobs:
    return PromptLogprobs(
        float(scores.logprobs[token]),
        scores.top_ids[token, :count].tolist(),
        scores.top_logprobs[token, :count].tolist(),
        int(scores.ranks[token]),
    )
