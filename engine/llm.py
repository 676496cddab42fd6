"""The offline API: prompts in, completions out, without HTTP.

    with LLM(["model=gpt-oss-20b", "model.path=/models/gpt-oss-20b"]) as llm:
        (completion,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=16, seed=0))

A composition root like serve.py, and so the only module of the engine that may import `demo.bundle`. Knows text only to
encode prompts and decode completions.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conf.limits import END_OF_TURN
from conf.schema import Config, ConfigError, ServerConfig, compose
from demo.bundle import with_demo_folder
from engine.channel import StepChannel
from engine.core import Core
from engine.lifetime import rank_process
from engine.messages import Abort, Delta, FinishReason, FromEngine, PromptLogprobs, StepReport, Submit, TokenLogprobs
from engine.parallel import Ranks
from engine.run_folder import RunFolder
from engine.start import Engine, device_of, start
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams

DEFAULT_TOKENS = 128
POLL_SECONDS = 0.1

Result = TypeVar("Result")


class RankDied(RuntimeError):
    """A rank's process ended; the message says which and how. What it could not start for is in its log."""


@dataclass(frozen=True)
class Completion:
    """What became of one prompt."""

    prompt_tokens: list[int]
    tokens: list[int]  # the stop token included, where there is one
    text: str  # of the tokens, without control tokens
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None  # one a token, where the sampling parameters ask for them
    cached_tokens: int  # of the prompt, found in the prefix cache
    prompt_logprobs: list[PromptLogprobs] | None  # one a token of the prompt but the first, where they are asked for


class LLM:
    """An engine in this process: rank 0 here, the others in processes of their own.

    `overrides` are those of serve.py's command line. On a CPU the process is set up for the engine: see
    `graphs.capture.prepare_cpu_process`. The other ranks end with the thread that made this object.

    Raises ConfigError, CheckpointError and the other `engine.start.CANNOT_START`, or RankDied.
    """

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        config = compose(overrides)
        if replace(config.server, log_level=ServerConfig.log_level) != ServerConfig():
            raise ConfigError("server: got keys that have no effect offline, allowed: server.log_level")
        config = with_demo_folder(config)
        self._folder = RunFolder()
        self._others = [rank_process(config, rank, self._folder.path) for rank in range(1, config.tp)]
        self._ranks: Ranks | None = None
        self._ids = itertools.count()
        self._deltas: dict[int, list[Delta]] = {}  # of the requests of the current call
        self._finished = 0
        self.tokenizer = Tokenizer()
        self.engine, self._core = self._watched(lambda: self._start(config))

    def _start(self, config: Config) -> tuple[Engine, Core]:
        folder = Path(self._folder.path)
        device = device_of(config, 0)
        self._ranks = Ranks(0, config.tp, folder)
        engine = start(config, self._ranks, device)
        channel = StepChannel(self._ranks, engine.buffers.max_words, folder)
        return engine, engine.core(self._publish, channel.send if config.tp > 1 else None)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions of all prompts, in their order; a bar shows the progress if standard error is a terminal.

        prompts: texts, or token ids. A text is encoded as it is: no chat template, no control tokens.
        sampling: one for all prompts or one each; None: greedy, to the end of the turn, at most 128 tokens.

        Raises ValueError, before anything is generated, for a prompt that can never run, and RankDied.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: got one text, allowed: a list of texts or of lists of token ids")
        if sampling is None:
            ends = tuple(token for token in END_OF_TURN if token < self.engine.ready.vocab_size)
            sampling = SamplingParams(max_tokens=DEFAULT_TOKENS, seed=0, temperature=0.0, stop_token_ids=ends)
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        if len(each) != len(prompts):
            raise ValueError(f"sampling: got {len(each)} for {len(prompts)} prompts, allowed: one, or one a prompt")
        submits = []
        for number, (prompt, parameters) in enumerate(zip(prompts, each, strict=True)):
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            self._check(f"prompt {number}", tokens)
            self._check(f"stop_token_ids of prompt {number}", parameters.stop_token_ids)
            self._check(f"logit_bias of prompt {number}", parameters.logit_bias)
            submits.append(Submit(next(self._ids), tokens, parameters))
        self._deltas, self._finished = {submit.id: [] for submit in submits}, 0
        try:
            for number, submit in enumerate(submits):
                self._core.handle(submit)
                if refusal := self._deltas[submit.id]:
                    raise ValueError(f"prompt {number}: {refusal[0].error}")
            self._watched(lambda: self._run(len(submits)))
        finally:
            for submit in submits:
                self._core.handle(Abort(submit.id))  # what an exception left unfinished
        return [self._completion(submit, self._deltas[submit.id]) for submit in submits]

    def _check(self, what: str, tokens: Iterable[int]) -> None:
        vocab = self.engine.ready.vocab_size
        for token in tokens:
            if not 0 <= token < vocab:
                raise ValueError(f"{what}: got token id {token}, allowed: 0 to {vocab - 1}")

    def _run(self, requests: int) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=requests)
            while self._core.turn():
                bar.update(task, completed=self._finished)

    def _publish(self, message: FromEngine) -> None:
        assert isinstance(message, StepReport)
        for delta in message.deltas:
            self._deltas[delta.id].append(delta)
            self._finished += delta.finish_reason is not None

    def _completion(self, submit: Submit, deltas: list[Delta]) -> Completion:
        tokens = [token for delta in deltas for token in delta.tokens]
        reason = deltas[-1].finish_reason
        assert reason is not None
        return Completion(
            prompt_tokens=submit.prompt,
            tokens=tokens,
            text=self.tokenizer.decode(tokens, skip_special=True),
            finish_reason=reason,
            logprobs=None if deltas[0].logprobs is None else [entry for d in deltas for entry in d.logprobs or []],
            cached_tokens=deltas[0].cached_tokens or 0,
            prompt_logprobs=None
            if submit.sampling.prompt_logprobs is None
            else [entry for delta in deltas for entry in delta.prompt_logprobs or []],
        )

    def _watched(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs in a thread where there are other ranks: when one dies, it may never end.

        An exception then closes the engine: the ranks no longer agree on the step they are at.
        """
        if not self._others:
            return work()
        future: Future[Result] = Future()
        Thread(target=_complete, args=(future, work), daemon=True).start()
        try:
            while not future.done() and not self._ending():
                wait([future], POLL_SECONDS)
            if future.done() and not future.exception():
                return future.result()
            time.sleep(POLL_SECONDS)  # the collectives notice a dead rank too, perhaps sooner, and name none
            if ending := self._ending():
                raise RankDied(ending)
            return future.result()
        except BaseException:
            self.close()
            raise

    def _ending(self) -> str | None:
        """How the first of the other ranks that has ended did; None while all run."""
        return next((ending for rank in self._others if (ending := rank.ending)), None)

    def close(self) -> None:
        """End the other ranks. The memory is free once nothing refers to this object."""
        for rank in self._others:
            rank.kill()
        if self._ranks:
            self._ranks.close()
            self._ranks = None
        self._folder.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _complete(future: "Future[Result]", work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
