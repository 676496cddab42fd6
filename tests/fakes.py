"""A fake engine behind the seam `serve.client.Engine`: it plays scripted token ids and remembers what was submitted."""

import asyncio
from collections.abc import Callable

from engine.messages import Delta, PromptLogprobs, Ready, Stats, TokenLogprobs
from graphs.plan import SamplingParams
from serve.client import EngineFailed

Script = Callable[[list[int], SamplingParams], list[int]]


def ready(vocab_size: int = 201088, max_context: int = 1024, scored: int = 64) -> Ready:
    buckets = {"score": [scored]} if scored else {}
    return Ready(
        vocab_size, max_context, pages=16, device="fake", kernels="none", tp=1, phases={}, memory={}, buckets=buckets
    )


class FakeEngine:
    """Plays `script(prompt, sampling)` for every request: a list of token ids, cut at the first stop token and at
    max_tokens, endless where the list is (it repeats to max_tokens without one).

    `step`: tokens a Delta brings. `delay`: seconds before each Delta. `hold`: Deltas wait until it is set.
    `break_after`: so many tokens into a request, it ends with the error `broken`, or, where that is an exception,
    raises it.
    """

    def __init__(self, script: Script | list[int], **ready_figures: int) -> None:
        self._script = script if callable(script) else lambda prompt, sampling: script
        self.ready: Ready | None = ready(**ready_figures)
        self.failure: str | None = None
        self.stats = Stats()
        self.step, self.delay = 1, 0.0
        self.score_step = 1024  # tokens of a prompt whose log probabilities a Delta brings
        self.hold: asyncio.Event | None = None
        self.break_after: int | None = None
        self.broken: str | Exception = "out of pages"
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.salts: list[bytes] = []  # of those submitted
        self.aborted: list[int] = []  # positions in `submitted`
        self.running: set[int] = set()

    @property
    def outstanding(self) -> int:
        return len(self.running)

    def submit(self, prompt: list[int], sampling: SamplingParams, salt: bytes = b"") -> "FakeStream":
        if self.failure:
            raise EngineFailed(self.failure)
        id = len(self.submitted)
        self.submitted.append((prompt, sampling))
        self.salts.append(salt)
        self.running.add(id)
        return FakeStream(self, id, self._answer(prompt, sampling), sampling)

    def _answer(self, prompt: list[int], sampling: SamplingParams) -> list[int]:
        tokens = self._script(prompt, sampling)[: sampling.max_tokens]
        ends = [i for i, token in enumerate(tokens) if token in sampling.stop_token_ids]
        return tokens[: ends[0] + 1] if ends else tokens


class FakeStream:
    def __init__(self, engine: FakeEngine, id: int, tokens: list[int], sampling: SamplingParams) -> None:
        self._engine, self._id, self._tokens, self._sampling = engine, id, tokens, sampling
        self._at = 0
        self._begun = False  # the first Delta is out
        self._unscored = engine.submitted[id][0][1:] if sampling.prompt_logprobs is not None else []

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Delta:
        engine = self._engine
        if self._id not in engine.running:
            raise StopAsyncIteration
        if engine.hold:
            await engine.hold.wait()
        await asyncio.sleep(engine.delay)
        if engine.failure:
            raise EngineFailed(engine.failure)
        if engine.break_after is not None and self._at >= engine.break_after:
            engine.running.discard(self._id)
            if isinstance(engine.broken, Exception):
                raise engine.broken
            return Delta(self._id, [], "error", error=engine.broken)
        part, self._unscored = self._scores(), self._unscored[engine.score_step :]
        first, self._begun = not self._begun, True
        if self._unscored:
            return Delta(self._id, [], None, self._logprobs([]), 3 if first else None, prompt_logprobs=part)
        self._at += engine.step
        tokens = self._tokens[self._at - engine.step : self._at]
        reason = None
        if self._at >= len(self._tokens):
            reason = "stop" if self._tokens and self._tokens[-1] in self._sampling.stop_token_ids else "length"
            engine.running.discard(self._id)
        return Delta(
            self._id,
            tokens,
            reason,
            self._logprobs(tokens),
            cached_tokens=3 if first else None,
            queue_seconds=0.25 if first else None,
            prompt_logprobs=part,
        )

    def _scores(self) -> list[PromptLogprobs] | None:
        top = self._sampling.prompt_logprobs
        if top is None:
            return None
        tokens = self._unscored[: self._engine.score_step]
        return [PromptLogprobs(-0.25, list(range(t, t + top)), [-0.25 - i for i in range(top)], 1) for t in tokens]

    def _logprobs(self, tokens: list[int]) -> list[TokenLogprobs] | None:
        top = self._sampling.logprobs
        if top is None:
            return None
        return [TokenLogprobs(-0.5, list(range(t, t + top)), [-0.5 - i for i in range(top)]) for t in tokens]

    async def aclose(self) -> None:
        if self._id in self._engine.running:
            self._engine.running.discard(self._id)
            self._engine.aborted.append(self._id)
