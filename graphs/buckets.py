"""Bucket shapes as data, and the pure function that chooses one. Knows numbers only."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["decode", "prefill", "score"]


@dataclass(frozen=True)
class Bucket:
    """One captured shape.

    decode: `tokens` == `sequences` == rows, one token each.
    prefill: up to `sequences` prompts (or chunks of prompts) packed into `tokens` tokens.
    score: a prefill that also computes log probabilities of its prompts' tokens.
    """

    kind: Kind
    tokens: int
    sequences: int


@dataclass(frozen=True)
class Buckets:
    """The shapes of one server, ascending."""

    decode: tuple[Bucket, ...]
    prefill: tuple[Bucket, ...]
    score: tuple[Bucket, ...]  # none: prompts have no log probabilities

    @classmethod
    def of(
        cls,
        decode_rows: Sequence[int],
        prefill_tokens: Sequence[int],
        prefill_sequences: int,
        score_tokens: Sequence[int] = (),
    ) -> "Buckets":
        return cls(
            decode=tuple(Bucket("decode", rows, rows) for rows in decode_rows),
            prefill=tuple(Bucket("prefill", tokens, min(tokens, prefill_sequences)) for tokens in prefill_tokens),
            score=tuple(Bucket("score", tokens, min(tokens, prefill_sequences)) for tokens in score_tokens),
        )

    @property
    def all(self) -> tuple[Bucket, ...]:
        """In the order in which ranks number them."""
        return self.decode + self.prefill + self.score

    @property
    def max_rows(self) -> int:
        """Requests that can run at once."""
        return self.decode[-1].tokens

    @property
    def max_sequences(self) -> int:
        """Tokens that a step draws at most."""
        return max(bucket.sequences for bucket in self.all)

    @property
    def max_scored(self) -> int:
        """Tokens that a step scores at most; 0 where none does."""
        return self.score[-1].tokens if self.score else 0

    def choose(self, kind: Kind, tokens: int) -> Bucket:
        """The smallest bucket of `kind` that holds `tokens`. Raises ValueError where none does."""
        shapes = {"decode": self.decode, "prefill": self.prefill, "score": self.score}[kind]
        index = bisect_left(shapes, tokens, key=lambda bucket: bucket.tokens)
        if tokens < 1 or index == len(shapes):
            raise ValueError(f"no {kind} bucket holds {tokens} tokens; there are {[b.tokens for b in shapes]}")
        return shapes[index]
