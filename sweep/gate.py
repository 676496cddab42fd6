"""The correctness gate: greedy tokens of fixed prompts must equal the baseline's, except where two tokens tie."""

from dataclasses import dataclass

import httpx
import numpy as np

PROMPT_LENGTHS = (3, 40, 70, 150)  # 3 and 40 within a page, 70 over two pages, 150 longer than the attention window


@dataclass
class Greedy:
    """The answer to one prompt."""

    tokens: list[int]
    logprobs: list[float]


class GateFailed(RuntimeError):
    """The server did not answer a prompt; the message says why."""


def prompts(vocab: int, context: int) -> list[list[int]]:
    """Fixed random prompts of token ids below `vocab`, each at most half of `context` long."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab, min(length, context // 2)).tolist() for length in PROMPT_LENGTHS]


def answers(url: str, model: str, prompts: list[list[int]], tokens: int, seconds: float) -> list[Greedy]:
    """The server's greedy answers of `tokens` tokens, each within `seconds`. Raises GateFailed."""
    greedy = []
    for prompt in prompts:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }
        try:
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=seconds)
        except httpx.HTTPError as error:
            raise GateFailed(f"the gate's prompt got no answer: {type(error).__name__} {error}") from error
        if reply.status_code != 200:
            raise GateFailed(f"the gate's prompt got HTTP {reply.status_code}: {reply.text[:200]}")
        choice = reply.json()["choices"][0]
        greedy.append(Greedy(choice["token_ids"], choice["logprobs"]["token_logprobs"]))
    return greedy


def difference(baseline: list[Greedy], answers: list[Greedy], tie: float) -> str | None:
    """A sentence about the first answer that differs by more than a tie; None if there is none.

    Up to the first token that differs both servers have seen the same tokens. There it is a tie if the log
    probabilities that the two servers give their own tokens differ by at most `tie`. Later tokens are not compared:
    they follow different tokens.
    """
    for number, (expected, actual) in enumerate(zip(baseline, answers, strict=True)):
        if len(expected.tokens) != len(actual.tokens):
            return f"prompt {number}: {len(actual.tokens)} tokens, {len(expected.tokens)} in the baseline"
        pairs = zip(expected.tokens, actual.tokens, strict=True)
        at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if at is not None and (gap := abs(expected.logprobs[at] - actual.logprobs[at])) > tie:
            return (
                f"prompt {number}, token {at}: {actual.tokens[at]}, the baseline has {expected.tokens[at]} "
                f"(log probabilities {gap:.3f} apart)"
            )
    return None
