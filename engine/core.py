"""The only loop: plan, choose a bucket, load, replay, collect, publish.

The host plans and launches step n+1 while step n runs, and only then waits for n's tokens. Knows requests and steps;
never sees text.
"""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from conf.limits import VOCABULARY
from engine.grammar import Constraint, Grammars
from engine.messages import (
    Abort,
    BucketStats,
    Delta,
    FromEngine,
    PromptLogprobs,
    Stats,
    StepReport,
    Submit,
    ToEngine,
    TokenLogprobs,
)
from engine.scheduler import Scheduled, Scheduler
from graphs.buckets import Bucket
from graphs.buffers import Buffers, Sampled, Scores, Staging
from graphs.capture import Steps, Wait

COMPILE_POLL = 0.01  # seconds that an idle loop waits for a grammar before it looks for messages

Send = Callable[[int, npt.NDArray[np.int32]], None]


class Compiling(NamedTuple):
    """A request whose grammar is being compiled."""

    submit: Submit
    start: Future[LLMatcher]
    arrival: float


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
        self._grammars = Grammars()
        self._compiling: dict[int, Compiling] = {}  # by id of the request
        self._used = [[0, 0] for _ in self._index]  # steps and rows used, by bucket

    def handle(self, message: ToEngine) -> None:
        """Take in a message. A request that can never run is answered at once, with an error."""
        if isinstance(message, Abort):
            self._compiling.pop(message.id, None)
            self.scheduler.abort(message.id)
        elif message.sampling.grammar and self._buffers.mask_words * 32 < VOCABULARY:
            self._refuse(message, "a grammar: this model has not all tokens of the vocabulary that grammars are over")
        elif message.sampling.grammar:
            start = self._grammars.compile(message.sampling.grammar)
            self._compiling[message.id] = Compiling(message, start, time.monotonic())
        else:
            self._add(message, time.monotonic())

    def _add(self, submit: Submit, arrival: float, start: Future[LLMatcher] | None = None) -> None:
        """To the scheduler; `start`: where the request's grammar starts."""
        try:
            constraint = Constraint(start.result(), submit.sampling) if start else None
            self.scheduler.add(submit, arrival, constraint)
        except ValueError as error:
            self._refuse(submit, str(error))

    def _refuse(self, submit: Submit, error: str) -> None:
        self._publish(StepReport([Delta(submit.id, [], "error", error=error)], self.stats()))

    def turn(self) -> bool:
        """Launch the next step if there is one, then collect the one before. False when there was nothing to do."""
        for id, (submit, start, arrival) in list(self._compiling.items()):
            if start.done():
                del self._compiling[id]
                self._add(submit, arrival, start)
        if self._step():
            return True
        wait([compiling.start for compiling in self._compiling.values()], COMPILE_POLL, FIRST_COMPLETED)
        return bool(self._compiling)

    def _step(self) -> bool:
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
        constrained = [(row, r.constraint) for row, r in enumerate(scheduled.rows) if r is not None and r.constraint]
        masks = self._buffers.fill(step, bucket, staging, [row for row, _ in constrained])
        self._grammars.fill([constraint for _, constraint in constrained], masks)
        index = self._index[bucket]
        if self._send:
            self._send(index, staging.words[: self._buffers.used_words(bucket, staging)].numpy())
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
            waiting=scheduler.waiting + len(self._compiling),
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
