"""The immutable step on which the scheduler and the buffers agree. Knows slots, pages and token ids; no torch.

A running request owns a *slot*: a row of the persistent device state (page table, sampling parameters, last sampled
token). Prefill installs a request in its slot, decode then only names slots: that keeps the decode step's transfer at
three numbers a row, and lets the sampled token stay on the device.
"""

from dataclasses import dataclass
from typing import Any

NO_PAGE = -1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request, whose keys and values this step computes."""

    slot: int
    tokens: list[int]  # token ids; at least one
    start: int  # position of tokens[0] in the request
    prompt_tokens: int  # length of the request's own prompt; tokens from there on are earlier answers (preempted)
    pages: list[int]  # page ids, in order, covering at least positions 0 .. start + len(tokens) - 1
    samples: bool  # the chunk is the last: draw the next token after it
    sampling: Any  # engine.messages.SamplingParams, which buffers.py packs by field name


@dataclass(frozen=True, slots=True)
class PrefillStep:
    chunks: list[Chunk]

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token for each row. The input token is the one last sampled in that slot; the host may not know it yet."""

    slots: list[int]
    positions: list[int]  # of the input token, whose key and value this step appends
    new_pages: list[int]  # page id that starts at this position, else NO_PAGE


Step = PrefillStep | DecodeStep
