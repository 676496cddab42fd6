"""Requests to send: prompts and lengths, fixed, drawn or read; the same for the same seed.

Knows token ids and numbers; not how they are sent.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import Config, ConfigError, Weights
from sweep.settings import SweepConfig

FIRST_CONTROL_TOKEN = 199998  # of the published vocabulary


@dataclass(frozen=True)
class Request:
    prompt: str | list[int]
    output_tokens: int
    seed: int


class Workload:
    """An endless supply of requests; `stream` tells one load's or repeat's from another's, so that none shares pages.

    Raises ConfigError for a prompts file that cannot be used.
    """

    def __init__(self, settings: SweepConfig, config: Config) -> None:
        self._settings = settings
        self._context = config.buckets.max_context
        vocab = config.model.random_shape.vocab_size if config.model.weights is Weights.random else FIRST_CONTROL_TOKEN
        self.vocab = min(vocab, FIRST_CONTROL_TOKEN)
        self._given = _read(Path(settings.prompts)) if settings.prompts else None
        longest = settings.prompt_tokens + settings.output_tokens
        if self._given is None and longest > self._context:
            raise ConfigError(
                f"sweep.prompt_tokens + sweep.output_tokens: got {longest}, allowed: at most "
                f"buckets.max_context = {self._context}"
            )

    def requests(self, count: int, *stream: int) -> list[Request]:
        settings, made = self._settings, []
        draw = np.random.default_rng([settings.seed, *stream])
        for _ in range(count):
            output = self._length(draw, settings.output_tokens, settings.output_sigma, self._context // 2)
            seed = int(draw.integers(2**31))
            if self._given is None:
                length = self._length(draw, settings.prompt_tokens, settings.prompt_sigma, self._context - output)
                prompt = draw.integers(0, self.vocab, length).tolist()
            else:
                line = self._given[int(draw.integers(len(self._given)))]
                prompt, output = line["prompt"], line.get("output_tokens", output)
            made.append(Request(prompt, output, seed))
        return made

    def arrivals(self, rate: float, *stream: int) -> list[float]:
        """Seconds from the start at which an open loop sends: a Poisson process over the budget, at least one."""
        draw, times, now = np.random.default_rng([self._settings.seed, 1, *stream]), [], 0.0
        while now < self._settings.seconds:
            times.append(now)
            now += float(draw.exponential(1 / rate))
        return times

    @staticmethod
    def _length(draw: np.random.Generator, median: int, sigma: float, most: int) -> int:
        return int(np.clip(round(median * float(np.exp(sigma * draw.standard_normal()))), 1, most)) if sigma else median


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"sweep.prompts: {error}") from error
    if not lines or not all(isinstance(line, dict) and isinstance(line.get("prompt"), str | list) for line in lines):
        raise ConfigError(f'sweep.prompts: got {path}, allowed: lines of {{"prompt": text or token ids}}')
    return lines
