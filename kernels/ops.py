"""What a set of kernels must offer: the operations of the forward, their arguments, and what they return.

`kernels.reference` (plain torch, the oracle) and `kernels.hopper` (the H100's) implement `KernelSet`; `kernels.choose`
picks one at start. Knows tensors; no configuration, no requests, no model.

A set has two namespaces with the same operations. `decode` takes one token of each request, `prefill` packed prompts.
Which one a step uses is decided by the kind of step, never by its number of tokens: within a namespace a token's bytes
depend on nothing but its own request, whatever the batch.

Shapes: T tokens, R rows (of a step's logits), H hidden, E experts, K chosen experts a token, V vocabulary, D head
dimension, P entries of a page table row. C is the compute dtype: bfloat16, or float32 with the reference.
"""

from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

NO_MASK = -1

Array = TypeVar("Array")  # a torch tensor on the device, a numpy array on the host


class UnsupportedError(ValueError):
    """Kernels that cannot run with one of the arguments of `choose` or `join`.

    Which configuration key that argument came from is the caller's knowledge: it can put the key before `given` and
    `allowed`.
    """

    def __init__(
        self, argument: Literal["name", "dtype", "ranks", "prefill_tokens"], given: object, allowed: str
    ) -> None:
        super().__init__(f"{argument}: got {given}, allowed: {allowed}")
        self.argument = argument
        self.given = given
        self.allowed = allowed  # what would be right, and why `given` is not


class Ranks(Protocol):
    """The tensor-parallel ranks, as `engine.parallel.Ranks` implements them."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, N] of each rank -> [R, ranks * N] on every rank."""

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers, on every rank; also a barrier."""


@dataclass(frozen=True)
class ExchangeArea:
    """A range of every rank's memory into which the other ranks' kernels write, at the same offset in each.

    memories [ranks] int64: the addresses; None where there is one rank, or where ranks exchange otherwise.
    """

    memories: Tensor | None = None
    offset: int = 0  # bytes
    bytes: int = 0


@dataclass(frozen=True)
class Peers:
    """The ranks as operations see them: made by `KernelSet.join`, and given to every operation that adds up ranks."""

    ranks: Ranks
    attention: ExchangeArea = ExchangeArea()  # for the sum after attention
    mlp: ExchangeArea = ExchangeArea()  # for the sum after the experts
    sampler: ExchangeArea = ExchangeArea()
    scorer: ExchangeArea = ExchangeArea()
    mapped: object = None  # keeps the areas mapped

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def size(self) -> int:
        return self.ranks.size


@dataclass(frozen=True)
class PackedLinear:
    """A dense layer as `pack_linear` of the same set made it; what `tiles` holds is that set's business."""

    tiles: Tensor
    bias: Tensor | None  # [rows] C
    rows: int  # N, output features
    columns: int  # K, input features


@dataclass(frozen=True)
class PackedExperts:
    """One MXFP4 projection of all experts as `pack_experts` of the same set made it."""

    values: Tensor
    scales: Tensor
    bias: Tensor  # [E, rows] C, in the checkpoint's order
    rows: int
    columns: int
    interleaved: bool  # even rows are gates, odd rows ups


class Norm(NamedTuple):
    """RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

    weight: Tensor  # [H] float32
    eps: float


class Router(NamedTuple):
    """The linear layer that chooses experts."""

    weight: Tensor  # [E, H] C
    bias: Tensor  # [E] C
    top_k: int  # experts a token goes through


class Routing(NamedTuple):
    """Which experts each token goes through."""

    expert_ids: Tensor  # [T, K] int64, the likeliest first; of equal logits the lower id first
    weights: Tensor  # [T, K] float32: the softmax over the chosen logits


class TokenPlaces(NamedTuple):
    """Where a step's tokens stand."""

    positions: Tensor  # [T] int32, in their requests
    slots: Tensor  # [T] int32, the rows of the page table; tokens of a slot stand together in a prefill


class Rope(NamedTuple):
    """Rotary embedding tables; YaRN's temperature is multiplied in."""

    cos: Tensor  # [positions, D / 2] float32
    sin: Tensor


class KvPages(NamedTuple):
    """One layer's key/value pages, and the table that says whose they are."""

    keys: Tensor  # [pages, kv heads, tokens of a page, D] C
    values: Tensor
    table: Tensor  # [slots, P] int32, shared by all layers


class AttentionParameters(NamedTuple):
    """What attention learned or was given for one layer."""

    sinks: Tensor  # [heads] float32: a learned logit that joins the softmax's denominator and takes no value
    window: int | None  # keys a token sees, itself included; None: all


@dataclass(frozen=True)
class SamplingState(Generic[Array]):
    """Sampling parameters, a row a slot (or a sequence, on their way there). See graphs.plan.SamplingParams."""

    temperature: Array  # [rows] float32; 0: greedy, others such that no logit divided by them overflows
    top_k: Array  # [rows] int32; 0: all
    top_p: Array  # [rows] float32
    min_p: Array  # [rows] float32
    repetition_penalty: Array  # [rows] float32
    frequency_penalty: Array  # [rows] float32
    presence_penalty: Array  # [rows] float32
    seed: Array  # [rows, 2] int32, low and high word
    prompt_tokens: Array  # [rows] int32
    bias_ids: Array  # [rows, entries] int32
    bias_values: Array  # [rows, entries] float32
    bias_until: Array  # [rows, entries] int32: the entry counts for tokens drawn before this position
    logprobs: Array  # [rows] int32; 0: none wanted; 1: the drawn token's; more: also those of the likeliest


class TokenCounts(NamedTuple):
    """What penalties need to know of the tokens so far, by slot; of a slot without penalties anything."""

    output: Tensor  # [slots, V] int32: times each token was generated
    in_prompt: Tensor  # [slots, V] uint8


class Chunks(NamedTuple):
    """What a prefill step computes of each request: a row a chunk; S of them. Rows to spare name the padding slot."""

    slots: Tensor  # [S] int32
    starts: Tensor  # [S] int32, position of the chunk's first token; 0: the slot has a new request
    last: Tensor  # [S] int32, index of the chunk's last token in the step, where its tokens stand together
    page_table: Tensor  # [S, P] int32
    sampling: SamplingState[Tensor]  # a row a chunk; rows to spare have no penalties


class TokenMasks(NamedTuple):
    """Which tokens the rows may draw: each row all of them, or those of a mask."""

    rows: Tensor  # [R] int32: the row's mask in `words`, NO_MASK where it may draw all
    words: Tensor  # [masks, ceil(V / 32)] int32: bit v % 32 of word v // 32 is set where token v may be drawn


class Sampled(NamedTuple):
    """What was drawn, by row. Log probabilities are those of the raw logits: before masks, penalties, bias and filters.

    Where a row does not want them (SamplingState.logprobs), log probabilities and the likeliest tokens are 0.
    """

    tokens: Tensor  # [R] int32
    logprobs: Tensor  # [R] float32, of the drawn tokens
    top_ids: Tensor  # [R, top] int32, the likeliest first; of equal ones the lower id first
    top_logprobs: Tensor  # [R, top] float32


class Scored(NamedTuple):
    """What a model thinks of given tokens, by row: of all tokens that could stand in their place, a log probability.

    The likelier token goes first, of equal ones the one of the lower id. Rows without a target hold anything.
    """

    ranks: Tensor  # [R] int32: the target's place in that order, from 1
    logprobs: Tensor  # [R] float32, of the targets
    top_ids: Tensor  # [R, top] int32, the likeliest first
    top_logprobs: Tensor  # [R, top] float32


class Operations(Protocol):
    """The forward's operations for one kind of step. All may be captured in a CUDA graph; none waits for the device."""

    def embed_norm(self, tokens: Tensor, table: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """tokens [T] int32, table [V, H] C -> their rows, the residual stream x [T, H], and its norm h [T, H]."""

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """x [T, K] -> x W^T + bias [T, N]. Raises ValueError for an x that does not fit the weight."""

    def linear_partial(self, x: Tensor, weight: PackedLinear, peers: Peers) -> Tensor:
        """`linear` for a weight cut by columns: a partial sum, which `add_norm_route` adds up over the ranks.

        A kernel may send it to the other ranks from where it is made. -> [T, N].
        """

    def attention(
        self, qkv: Tensor, tokens: TokenPlaces, rope: Rope, pages: KvPages, parameters: AttentionParameters
    ) -> Tensor:
        """Causal attention over a request's pages, with sinks (Xiao et al. 2023) and, in some layers, a window.

        qkv [T, (heads + 2 kv heads) * D], query rows first. Rotates queries and keys, writes keys and values to their
        pages. Entries of the table past a token's position, and keys it does not see, may hold anything, NaN included.
        -> [T, heads * D].
        """

    def add_norm_route(
        self, x: Tensor, delta: Tensor, norm: Norm, router: Router, peers: Peers
    ) -> tuple[Tensor, Tensor, Routing]:
        """x [T, H] + delta [T, H], the ranks' partial sums added up first; its norm; and the experts chosen for that.

        delta comes from `linear_partial`. -> x [T, H], h [T, H], routing.
        """

    def experts(self, h: Tensor, routing: Routing, gate_up: PackedExperts, down: PackedExperts, limit: float) -> Tensor:
        """Each token through its experts: gate and up, the clamped SwiGLU, down, times the routing weight.

        -> expert outputs [T, n, H] whose sum over n is the layer's output: n is K, or 1 where
        they are added up already.
        """

    def add_norm(self, x: Tensor, expert_outputs: Tensor, norm: Norm, peers: Peers) -> tuple[Tensor, Tensor]:
        """x [T, H] + the sum of expert outputs [T, n, H] over n and over the ranks; and its norm. -> x, h [T, H]."""


class KernelSet(Protocol):
    """All that a model asks of kernels. Modules implement it: `kernels.reference`, `kernels.hopper`."""

    @property
    def name(self) -> str:
        """As in the configuration."""

    @property
    def decode(self) -> Operations:
        """For steps of one token of each request."""

    @property
    def prefill(self) -> Operations:
        """For steps of packed prompts."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """weight [N, K] C, bias [N] C -> the form `linear` takes, on the same device. Raises ValueError."""

    def pack_experts(self, blocks: Tensor, scales: Tensor, bias: Tensor, interleaved: bool) -> PackedExperts:
        """MXFP4 (OCP Microscaling Formats 1.0) as in a checkpoint -> the form `experts` takes.

        blocks [E, N, K / 32, 16] uint8, low nibble first; scales [E, N, K / 32] uint8, 2^(byte - 127); bias [E, N] C.
        Raises ValueError for shapes or scales that the kernels do not take.
        """

    def join(
        self,
        ranks: Ranks,
        decode_rows: int,
        prefill_tokens: int,
        sequences: int,
        scored: int,
        hidden: int,
        device: torch.device,
    ) -> Peers:
        """Connect the ranks; all of them must call this. The numbers are the most that a step has; scored: tokens whose
        log probabilities it computes.

        Raises UnsupportedError where the ranks cannot exchange what they add up.
        """

    def install(
        self,
        chunks: Chunks,
        tokens: Tensor,
        places: TokenPlaces,
        table: Tensor,
        state: SamplingState[Tensor],
        counts: TokenCounts,
    ) -> Tensor:
        """The start of a prefill step: page table [slots, P] int32, sampling parameters and token counts by slot.

        tokens [T] int32. Counts are kept for chunks with penalties alone; a request's first forgets who had the slot
        before. -> the positions [S] int32 of the tokens to be drawn after each chunk.
        """

    def advance(
        self, tokens: TokenPlaces, new_pages: Tensor, pages: KvPages, last_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The start of a decode step. new_pages [T] int32: the page that begins at a token's position, negative: none.

        Notes new pages in the table. last_token [slots] int32. -> the tokens [T] int32 to compute, and the positions
        [T] int32 of those to be drawn.
        """

    def sample(
        self,
        logits: Tensor,
        tokens: TokenPlaces,
        state: SamplingState[Tensor],
        counts: TokenCounts,
        masks: TokenMasks,
        top: int,
        peers: Peers,
    ) -> Sampled:
        """Draw a token a row. logits [R, N] C: this rank's shard of the vocabulary, from rank * N; columns past V are
        not read. tokens: the slots, and the positions of the tokens to draw.

        Tokens that a mask leaves out have a logit of -inf. Penalties and bias first, then temperature, then top-k,
        top-p and min-p; then the largest logit plus Gumbel noise that depends on (seed, position, token) alone. The
        same on every rank.
        """

    def score(self, logits: Tensor, targets: Tensor, first_row: int, vocab: int, top: int, peers: Peers) -> Scored:
        """Log probabilities of given tokens. logits [R, N] C, as `sample` takes them; targets [R] int32, negative where
        a row has none.

        first_row: the number of the first row among all that the step scores, which are at most the `scored` that
        `join` was given; every row of a step has a number of its own. The same on every rank.
        """

    def emit(self, sampled: Sampled, slots: Tensor, last_token: Tensor, counts: TokenCounts, outputs: Tensor) -> None:
        """The end of a step: drawn tokens become their slots' next input and count as output.

        slots [R] int32, last_token [slots] int32. outputs [rows, 2 + 2 n] int32 takes, by row: the token, the bits of
        its log probability, top ids, and the bits of the top log probabilities.
        """
