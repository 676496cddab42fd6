"""The requests of a load: prompts and lengths, fixed, random or read from a file; the same for the same seed.

Knows token ids and numbers, not how requests are sent.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.limits import FIRST_SPECIAL
from conf.schema import Config, ConfigError, Weights
from engine.tokenizer import Tokenizer
from sweep.settings import SweepConfig
from sweep.store import key_of


@dataclass(frozen=True)
class Request:
    """One completion to ask for."""

    prompt: str | list[int]
    output_tokens: int
    seed: int


class Workload:
    """Draws requests. Different `stream` numbers give different prompts, so that no load or repeat finds another's
    pages in the prefix cache.

    Raises ConfigError for a prompts file that cannot be used, and for lengths that the context cannot hold.
    """

    def __init__(self, settings: SweepConfig, config: Config) -> None:
        self._settings = settings
        self._context = config.buckets.max_context
        vocab = config.model.random_shape.vocab_size if config.model.weights is Weights.random else FIRST_SPECIAL
        self.vocab = min(vocab, FIRST_SPECIAL)
        self._lines = read(settings.prompts) if settings.prompts else None
        what, longest = "prompt_tokens", settings.prompt_tokens + settings.output_tokens
        if self._lines is not None:  # how many tokens a text has, only the server knows
            what, longest = "prompts", max(map(self._tokens, self._lines))
        if longest > self._context:
            raise ConfigError(
                f"sweep.{what} + sweep.output_tokens: got {longest}, allowed: at most "
                f"buckets.max_context = {self._context}"
            )

    def requests(self, count: int, *stream: int) -> list[Request]:
        """`count` requests, the same for the same seed and stream."""
        settings = self._settings
        requests: list[Request] = []
        draw = np.random.default_rng([settings.seed, *stream])
        for _ in range(count):
            output = self._length(draw, settings.output_tokens, settings.output_sigma, self._context // 2)
            seed = int(draw.integers(2**31))
            if self._lines is None:
                length = self._length(draw, settings.prompt_tokens, settings.prompt_sigma, self._context - output)
                prompt = draw.integers(0, self.vocab, length).tolist()
            else:
                line = self._lines[int(draw.integers(len(self._lines)))]
                prompt, output = line["prompt"], line.get("output_tokens", output)
            requests.append(Request(prompt, output, seed))
        return requests

    def lengths(self) -> tuple[int, int]:
        """The tokens of a prompt, and those that a row holds halfway through its answer: medians of 100 requests."""
        requests = self.requests(100)
        tokenizer = Tokenizer()
        prompts = [tokenizer.encode(one.prompt) if isinstance(one.prompt, str) else one.prompt for one in requests]
        prompt = round(statistics.median(map(len, prompts)))
        return prompt, prompt + round(statistics.median(one.output_tokens for one in requests)) // 2

    def arrivals(self, rate: float, *stream: int) -> list[float]:
        """When an open loop sends, in seconds from the start: a Poisson process over `sweep.seconds`."""
        draw = np.random.default_rng([self._settings.seed, 1, *stream])
        times: list[float] = []
        now = float(draw.exponential(1 / rate))
        while now < self._settings.seconds:
            times.append(now)
            now += float(draw.exponential(1 / rate))
        return times

    def _tokens(self, line: dict[str, Any]) -> int:
        prompt = 1 if isinstance(line["prompt"], str) else len(line["prompt"])
        return prompt + int(line.get("output_tokens", self._settings.output_tokens))

    @staticmethod
    def _length(draw: np.random.Generator, median: int, sigma: float, most: int) -> int:
        return int(np.clip(round(median * float(np.exp(sigma * draw.standard_normal()))), 1, most)) if sigma else median


def about(settings: SweepConfig) -> dict[str, Any]:
    """The settings that the requests follow from; of a prompts file, a hash of its content. Raises ConfigError."""
    names = ("prompt_tokens", "output_tokens", "prompt_sigma", "output_sigma", "temperature", "seed")
    what = {name: getattr(settings, name) for name in names}
    return what | {"prompts": settings.prompts and key_of(read(settings.prompts))}


def read(path: str) -> list[dict[str, Any]]:
    """The lines of a prompts file. Raises ConfigError for one that is missing or has another form."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"sweep.prompts: {error}") from error
    if not lines or not all(isinstance(line, dict) and isinstance(line.get("prompt"), str | list) for line in lines):
        raise ConfigError(f'sweep.prompts: got {path}, allowed: lines of {{"prompt": text or token ids}}')
    return lines
