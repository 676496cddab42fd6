"""The messages that cross from the HTTP process to the engine and back.

Knows token ids, not text, and no tensor. The structs are msgspec's: they are the wire format (msgpack) as well.
"""

from typing import Literal

import msgspec

from graphs.buckets import Kind
from graphs.plan import SamplingParams

FinishReason = Literal["stop", "length", "error"]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """HTTP -> engine: start a request. `id` is unique for the life of the server."""

    id: int
    prompt: list[int]
    sampling: SamplingParams
    salt: bytes = b""  # prompts are found in the prefix cache only by requests of the same salt


class Abort(msgspec.Struct, frozen=True, tag=True):
    """HTTP -> engine: forget a request. No Delta follows; an unknown or finished id is ignored."""

    id: int


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities under the model's own distribution (before penalties, bias and filters)."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(TokenLogprobs, frozen=True, array_like=True):
    """The same of a token of the prompt, given those before it."""

    rank: int  # 1 for the likeliest of all tokens


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step adds to one request: usually one token, none with finish_reason "error" or max_tokens 0.

    The last token of a request that stopped on a stop token id is that id. `logprobs` is as long as `tokens` if the
    request wants them. `prompt_logprobs` are those of the prompt's tokens from the second on, in order, each once:
    those of a prompt of several chunks come in several Deltas, the last of them with the first token. `cached_tokens`
    and `queue_seconds` are in the first Delta only.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache
    queue_seconds: float | None = None  # from arrival in the engine to the first step
    error: str | None = None  # with finish_reason "error": what went wrong, fit for the client
    prompt_logprobs: list[PromptLogprobs] | None = None


class BucketStats(msgspec.Struct, frozen=True, array_like=True):
    """Cumulative counts of one bucket; a "row" is a request in decode and a token in prefill."""

    kind: Kind
    size: int
    steps: int
    rows_used: int
    rows_padded: int


class Stats(msgspec.Struct, frozen=True):
    """The engine's state after a step; counts are cumulative since start."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0  # held by a request; cached pages that nobody holds are not counted
    pages_total: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    buckets: list[BucketStats] = []


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """Engine -> HTTP, after each step that finished, and once more when the engine turns idle."""

    deltas: list[Delta]
    stats: Stats


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Engine -> HTTP, once: weights loaded, graphs captured, accepting. Figures for the start-up summary."""

    vocab_size: int
    max_context: int  # tokens of prompt and answer together
    pages: int
    device: str
    kernels: str
    tp: int
    phases: dict[str, float]  # seconds by phase, in order
    memory: dict[str, int]  # bytes by use
    buckets: dict[str, list[int]]  # sizes by kind

    @property
    def scores_prompts(self) -> bool:
        """Whether requests may ask for log probabilities of their prompts."""
        return bool(self.buckets.get("score"))


ToEngine = Submit | Abort
FromEngine = StepReport | Ready
