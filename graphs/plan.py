"""The immutable step on which the scheduler and the buffers agree. Knows slots, pages and token ids; no torch.

A running request owns a *slot*: a row of the persistent device state (page table, sampling parameters, last sampled
token). Prefill installs a request in its slot, decode then only names slots: that keeps the decode step's transfer at
three numbers a row, and lets the sampled token stay on the device.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from conf.limits import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, PAGE_TOKENS, SCRATCH_PAGE
from graphs.buckets import Bucket, Kind

NO_PAGE = -1
NO_TARGET = -1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are drawn.

    The order is: what the grammar forbids, penalties and bias on the raw logits, then temperature, then top-k, top-p
    and min-p. Equal logits at a filter's threshold are all kept. Raises ValueError for a value out of range, so that
    the packed inputs and the kernels have room for every instance.
    """

    max_tokens: int  # 0: nothing is drawn, the prompt alone is computed
    seed: int  # 0 <= seed < 2**63; the random numbers of a token depend on (seed, its position) and nothing else
    min_tokens: int = 0  # until then no token of stop_token_ids can be drawn, unless the grammar allows no other
    temperature: float = 1.0  # 0, or less than graphs.buffers.LEAST_TEMPERATURE: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}  # at most MAX_LOGIT_BIAS entries
    stop_token_ids: tuple[int, ...] = ()  # the model's own end tokens included; at most MAX_STOP_TOKENS
    logprobs: int | None = None  # the drawn token's log probability and this many of the likeliest tokens'
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    grammar: str = ""  # of the whole answer, in the form of `engine.grammar`; empty: any tokens may be drawn

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("logit_bias", len(self.logit_bias) <= MAX_LOGIT_BIAS, f"at most {MAX_LOGIT_BIAS} entries"),
            ("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_TOKENS, f"at most {MAX_STOP_TOKENS}"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_TOP_LOGPROBS, f"None or 0 to {MAX_TOP_LOGPROBS}"),
            (
                "prompt_logprobs",
                0 <= (self.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS,
                f"None or 0 to {MAX_TOP_LOGPROBS}",
            ),
        ):
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed: {allowed}")

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request, whose keys and values this step computes."""

    slot: int
    tokens: Sequence[int]  # token ids; at least one
    start: int  # position of tokens[0] in the request
    prompt_tokens: int  # length of the request's own prompt; tokens from there on are earlier answers (preempted)
    pages: Sequence[int]  # page ids, in order, covering at least positions 0 .. start + len(tokens) - 1
    samples: bool  # the chunk is the last: draw the next token after it
    sampling: SamplingParams
    targets: Sequence[int] = ()  # by token, NO_TARGET or none: the token whose log probability behind it is wanted


@dataclass(frozen=True, slots=True)
class PrefillStep:
    chunks: Sequence[Chunk]

    @property
    def kind(self) -> Kind:
        """score where a chunk has targets."""
        return "score" if any(chunk.targets for chunk in self.chunks) else "prefill"

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token for each row. The input token is the one last sampled in that slot; the host may not know it yet."""

    kind: ClassVar[Kind] = "decode"
    slots: Sequence[int]
    positions: Sequence[int]  # of the input token, whose key and value this step appends
    new_pages: Sequence[int]  # page id that starts at this position, else NO_PAGE

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.slots)


Step = PrefillStep | DecodeStep


def full_step(bucket: Bucket, context: int, slots: int, vocab: int = 1, pages: Sequence[int] = ()) -> Step:
    """A greedy step that fills `bucket`, for warm-up and benchmarks.

    decode: a row a slot, each of which computes the last of `context` tokens; what is in the slots' pages and what
    their last tokens are is left to the caller. prefill: as many whole prompts of `context` tokens as fit, at most
    `slots`, of random ids below `vocab`; score: the same, and each token is scored.

    pages: ids for the prompts, dealt out in order; where there are none, all prompts share the scratch page.
    """
    if bucket.kind == "decode":
        return DecodeStep(range(bucket.tokens), [context - 1] * bucket.tokens, [NO_PAGE] * bucket.tokens)
    each, draw = -(-context // PAGE_TOKENS), random.Random(0)
    greedy = SamplingParams(max_tokens=1, seed=0, temperature=0.0)

    def prompt(slot: int) -> Chunk:
        own = pages[slot * each : (slot + 1) * each] if pages else [SCRATCH_PAGE] * each
        tokens = draw.choices(range(vocab), k=context)
        targets = tokens if bucket.kind == "score" else ()
        return Chunk(slot, tokens, 0, context, own, True, greedy, targets)

    return PrefillStep([prompt(slot) for slot in range(min(slots, bucket.sequences, bucket.tokens // context))])
