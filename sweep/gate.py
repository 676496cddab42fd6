"""The correctness gate: greedy tokens of fixed prompts must equal the baseline's, up to ties."""

from dataclasses import dataclass

import httpx
import numpy as np

PROMPT_LENGTHS = (3, 40, 70, 150)  # within a page, across pages, more than the window


@dataclass
class Greedy:
    """One prompt's answer."""

    tokens: list[int]
    logprobs: list[float]


class GateFailed(RuntimeError):
    """The prompts could not be answered at all."""


def prompts(vocab: int, context: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab, min(length, context // 2)).tolist() for length in PROMPT_LENGTHS]


def answers(url: str, model: str, asked: list[list[int]], tokens: int, seconds: float) -> list[Greedy]:
    """Raises GateFailed."""
    found = []
    for prompt in asked:
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
        found.append(Greedy(choice["token_ids"], choice["logprobs"]["token_logprobs"]))
    return found


def difference(baseline: list[Greedy], found: list[Greedy], tie: float) -> str | None:
    """Where the answers part company for no good reason, in words; None where they do not.

    At the first token that differs both models have seen the same: it is a tie if each token is as likely to its own
    model as the other is, within `tie`. What follows has another past and is not compared.
    """
    for number, (ours, theirs) in enumerate(zip(baseline, found, strict=True)):
        if len(ours.tokens) != len(theirs.tokens):
            return f"prompt {number}: {len(theirs.tokens)} tokens, {len(ours.tokens)} in the baseline"
        pairs = zip(ours.tokens, theirs.tokens, strict=True)
        at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if at is not None and (gap := abs(ours.logprobs[at] - theirs.logprobs[at])) > tie:
            return (
                f"prompt {number}, token {at}: {theirs.tokens[at]}, the baseline has {ours.tokens[at]} "
                f"(log probabilities {gap:.3f} apart)"
            )
    return None
