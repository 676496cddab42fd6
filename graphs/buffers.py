"""One object that owns every tensor a captured step reads or writes between steps.

Three kinds: key/value pages; state by slot (page table, sampling parameters, last token, token counts), which prefill
installs and decode only names; and the packed inputs and outputs that cross between host and device, one block each way
a step. Knows shapes, slots and pages; no requests, no weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from conf.limits import BIAS_ENTRIES, MAX_TOP_LOGPROBS, PAGE_TOKENS, SCRATCH_PAGE
from graphs.buckets import Bucket, Buckets
from graphs.plan import NO_PAGE, NO_TARGET, Chunk, DecodeStep, PrefillStep, Step
from kernels.ops import NO_MASK, Array, SamplingState, Scored

HostArray = npt.NDArray[Any]  # int32 or float32
Allocate = Callable[[tuple[int, ...], str], Array]  # (shape, dtype's name) -> an array
OUTPUT_WORDS = 2 + 2 * MAX_TOP_LOGPROBS  # token, its log probability, the ids and the values of the likeliest
SCORE_WORDS = 2 + 2 * MAX_TOP_LOGPROBS  # rank, log probability, the ids and the values of the likeliest
LEAST_TEMPERATURE = 1e-30  # a logit divided by less could overflow float32; the draw would be greedy but for ties


class Sampled(NamedTuple):
    """What one step drew, by row, on the host."""

    tokens: list[int]
    logprobs: npt.NDArray[np.float32]  # [rows], 0 where the row wants none
    top_ids: npt.NDArray[np.int32]  # [rows, MAX_TOP_LOGPROBS]
    top_logprobs: npt.NDArray[np.float32]  # [rows, MAX_TOP_LOGPROBS], 0 where the row wants none of them


class Scores(NamedTuple):
    """What one step found of its prompts' tokens, by token of the step, on the host."""

    ranks: npt.NDArray[np.int32]  # [tokens]
    logprobs: npt.NDArray[np.float32]  # [tokens]
    top_ids: npt.NDArray[np.int32]  # [tokens, MAX_TOP_LOGPROBS]
    top_logprobs: npt.NDArray[np.float32]  # [tokens, MAX_TOP_LOGPROBS]


@dataclass(frozen=True)
class DecodeInputs(Generic[Array]):
    """The packed inputs of a decode step, all [rows] int32: numpy on the host, torch on the device."""

    slots: Array
    positions: Array
    new_pages: Array
    mask_rows: Array  # which of `masks` the row draws by, or NO_MASK
    masks: Array  # [rows, words of a mask]: only the first ones, which rows name, cross to the device

    @classmethod
    def allocate(cls, allocate: Allocate[Array], bucket: Bucket, mask_words: int) -> "DecodeInputs[Array]":
        def ints(*shape: int) -> Array:
            return allocate(shape, "int32")

        rows = bucket.tokens
        return cls(ints(rows), ints(rows), ints(rows), ints(rows), ints(rows, mask_words))


@dataclass(frozen=True)
class PrefillInputs(Generic[Array]):
    """The packed inputs of a prefill step, int32 but for `sampling`: numpy on the host, torch on the device."""

    tokens: Array  # [tokens]
    positions: Array  # [tokens]
    slots: Array  # [tokens]
    sequence_slots: Array  # [sequences], the padding slot where there is no chunk
    sample_slots: Array  # [sequences], the padding slot where the chunk draws no token
    starts: Array  # [sequences], position of the chunk's first token
    last: Array  # [sequences], index of the chunk's last token
    page_table: Array  # [sequences, pages of a context]
    sampling: SamplingState[Array]  # a row a sequence
    targets: Array  # [tokens] where the bucket scores, or else [0]; NO_TARGET where nothing is wanted
    mask_rows: Array  # [sequences]: which of `masks` the sequence draws by, or NO_MASK
    masks: Array  # [sequences, words of a mask]: only the first ones, which sequences name, cross to the device

    @classmethod
    def allocate(
        cls, allocate: Allocate[Array], bucket: Bucket, context_pages: int, mask_words: int
    ) -> "PrefillInputs[Array]":
        def ints(*shape: int) -> Array:
            return allocate(shape, "int32")

        return cls(
            tokens=ints(bucket.tokens),
            positions=ints(bucket.tokens),
            slots=ints(bucket.tokens),
            sequence_slots=ints(bucket.sequences),
            sample_slots=ints(bucket.sequences),
            starts=ints(bucket.sequences),
            last=ints(bucket.sequences),
            page_table=ints(bucket.sequences, context_pages),
            sampling=sampling_state(allocate, bucket.sequences),
            targets=ints(bucket.tokens if bucket.kind == "score" else 0),
            mask_rows=ints(bucket.sequences),
            masks=ints(bucket.sequences, mask_words),
        )


Inputs = DecodeInputs[Array] | PrefillInputs[Array]


def sampling_state(allocate: Allocate[Array], rows: int) -> SamplingState[Array]:
    """Sampling parameters of `rows` rows, in the arrays that `allocate` gives."""

    def each(dtype: str, *columns: int) -> Array:
        return allocate((rows, *columns), dtype)

    return SamplingState(
        temperature=each("float32"),
        top_k=each("int32"),
        top_p=each("float32"),
        min_p=each("float32"),
        repetition_penalty=each("float32"),
        frequency_penalty=each("float32"),
        presence_penalty=each("float32"),
        seed=each("int32", 2),
        prompt_tokens=each("int32"),
        bias_ids=each("int32", BIAS_ENTRIES),
        bias_values=each("float32", BIAS_ENTRIES),
        bias_until=each("int32", BIAS_ENTRIES),
        logprobs=each("int32"),
    )


SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingState))


class Staging(NamedTuple):
    """The host's end of a step's transfers, pinned where there is a GPU."""

    words: Tensor  # int32, the packed inputs
    inputs: dict[Bucket, Inputs[HostArray]]  # the same, by field
    outputs: Tensor  # [rows, OUTPUT_WORDS] int32
    scores: Tensor  # [tokens of the largest bucket that scores, SCORE_WORDS] int32


class Buffers:
    """The device's tensors, and the way into and out of them for the host."""

    def __init__(
        self,
        *,
        buckets: Buckets,
        layers: int,
        kv_heads: int,
        head_dim: int,
        vocab: int,
        max_context: int,
        pages: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`pages` counts the scratch page; kv_heads are this rank's; dtype is that of keys and values."""
        slots = buckets.max_rows + 1
        self.buckets = buckets
        self.padding_slot = buckets.max_rows
        self.context_pages = max_context // PAGE_TOKENS
        self.mask_words = -(-vocab // 32)
        self.device = device
        shape = (layers, pages, kv_heads, PAGE_TOKENS, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.page_table = self._zeros((slots, self.context_pages), "int32")
        self.last_token = self._zeros((slots,), "int32")
        self.output_counts = self._zeros((slots, vocab), "int32")
        self.in_prompt = self._zeros((slots, vocab), "uint8")
        self.sampling: SamplingState[Tensor] = sampling_state(self._zeros, slots)
        self._words = {bucket: self._count_words(bucket) for bucket in buckets.all}
        self.max_words = max(self._words.values())
        self.words = self._zeros((self.max_words,), "int32")
        self.inputs: dict[Bucket, Inputs[Tensor]] = {
            bucket: self._inputs(_views(self.words, torch), bucket) for bucket in buckets.all
        }
        self.outputs = self._zeros((buckets.max_sequences, OUTPUT_WORDS), "int32")
        self.scores = self._zeros((buckets.max_scored, SCORE_WORDS), "int32")

    @staticmethod
    def page_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of a page's keys and values in all layers of a rank."""
        return 2 * layers * kv_heads * PAGE_TOKENS * head_dim * dtype.itemsize

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def _inputs(self, allocate: Allocate[Array], bucket: Bucket) -> Inputs[Array]:
        if bucket.kind == "decode":
            return DecodeInputs.allocate(allocate, bucket, self.mask_words)
        return PrefillInputs.allocate(allocate, bucket, self.context_pages, self.mask_words)

    def _count_words(self, bucket: Bucket) -> int:
        sizes: list[int] = []
        self._inputs(lambda shape, dtype: sizes.append(math.prod(shape)), bucket)
        return sum(sizes)

    # On the host -----------------------------------------------------------------------------------------------------

    def staging(self) -> Staging:
        """Host memory for one step in flight."""
        pinned = self.device.type == "cuda"
        words = torch.zeros(self.max_words, dtype=torch.int32, pin_memory=pinned)
        inputs = {bucket: self._inputs(_views(words.numpy(), np), bucket) for bucket in self.buckets.all}
        outputs = torch.zeros(self.outputs.shape, dtype=torch.int32, pin_memory=pinned)
        scores = torch.zeros(self.scores.shape, dtype=torch.int32, pin_memory=pinned)
        return Staging(words, inputs, outputs, scores)

    def words_of(self, bucket: Bucket) -> int:
        """int32 words of the packed inputs of a bucket's step without masks."""
        return self._words[bucket] - bucket.sequences * self.mask_words

    def used_words(self, bucket: Bucket, staging: Staging) -> int:
        """int32 words of the packed inputs of the step in `staging`, which end with the masks that its rows name."""
        masks = 1 + int(staging.inputs[bucket].mask_rows.max())
        return self.words_of(bucket) + masks * self.mask_words

    def fill(self, step: Step, bucket: Bucket, staging: Staging, masked: Sequence[int] = ()) -> HostArray:
        """Pack a step's inputs. Raises ValueError where it does not fit the bucket.

        masked: the rows or chunks that may not draw all tokens. -> where the caller is to write their masks, in this
        order: [len(masked), words of a mask] int32, as in `TokenMasks`.
        """
        inputs = staging.inputs[bucket]
        if isinstance(step, DecodeStep):
            rows = step.tokens
            if not isinstance(inputs, DecodeInputs) or rows > bucket.tokens:
                raise ValueError(f"{rows} decode rows do not fit {bucket}")
            inputs.slots[:rows], inputs.slots[rows:] = step.slots, self.padding_slot
            inputs.positions[:rows], inputs.positions[rows:] = step.positions, 0
            inputs.new_pages[:rows], inputs.new_pages[rows:] = step.new_pages, NO_PAGE
        else:
            if not isinstance(inputs, PrefillInputs) or step.tokens > bucket.tokens:
                raise ValueError(f"{step.tokens} tokens of a prefill do not fit {bucket}")
            if len(step.chunks) > bucket.sequences:
                raise ValueError(f"{len(step.chunks)} chunks do not fit {bucket}")
            self._fill_prefill(step, inputs)
        inputs.mask_rows[:] = NO_MASK
        inputs.mask_rows[list(masked)] = np.arange(len(masked))
        masks: HostArray = inputs.masks[: len(masked)]
        return masks

    def _fill_prefill(self, step: PrefillStep, inputs: PrefillInputs[HostArray]) -> None:
        end = 0
        inputs.targets[:] = NO_TARGET
        inputs.page_table[:] = SCRATCH_PAGE
        for row, chunk in enumerate(step.chunks):
            begin, end = end, end + len(chunk.tokens)
            inputs.tokens[begin:end] = chunk.tokens
            inputs.positions[begin:end] = np.arange(chunk.start, chunk.start + len(chunk.tokens))
            inputs.slots[begin:end] = chunk.slot
            inputs.sequence_slots[row] = chunk.slot
            inputs.sample_slots[row] = chunk.slot if chunk.samples else self.padding_slot
            inputs.starts[row] = chunk.start
            inputs.last[row] = end - 1
            inputs.page_table[row, : len(chunk.pages)] = chunk.pages
            if chunk.targets:
                inputs.targets[begin : begin + len(chunk.targets)] = chunk.targets
            _fill_sampling(inputs.sampling, row, chunk)
        inputs.tokens[end:], inputs.positions[end:], inputs.slots[end:] = 0, 0, self.padding_slot
        padding = slice(len(step.chunks), None)
        inputs.sequence_slots[padding] = inputs.sample_slots[padding] = self.padding_slot
        inputs.starts[padding], inputs.last[padding] = 0, 0
        for name in SAMPLING_FIELDS:
            getattr(inputs.sampling, name)[padding] = 0

    @staticmethod
    def sampled(staging: Staging, rows: int) -> Sampled:
        """What a finished step left in the host's memory."""
        columns = staging.outputs.numpy()[:rows]
        split = 2 + MAX_TOP_LOGPROBS
        return Sampled(
            columns[:, 0].tolist(),
            columns[:, 1].view(np.float32),
            columns[:, 2:split],
            columns[:, split:].view(np.float32),
        )

    @staticmethod
    def scored(staging: Staging) -> Scores:
        """What a finished step that scores left in the host's memory."""
        columns = staging.scores.numpy()
        split = 2 + MAX_TOP_LOGPROBS
        return Scores(
            columns[:, 0], columns[:, 1].view(np.float32), columns[:, 2:split], columns[:, split:].view(np.float32)
        )

    # On the device, inside the captured step -------------------------------------------------------------------------

    def put_scores(self, first: int, scored: Scored) -> None:
        """Scores of the step's tokens from `first` on to where the host reads them."""
        rows, top = scored.top_ids.shape
        out, split = self.scores[first : first + rows], 2 + MAX_TOP_LOGPROBS
        out[:, 0] = scored.ranks
        out[:, 1] = scored.logprobs.view(torch.int32)
        out[:, 2 : 2 + top] = scored.top_ids
        out[:, split : split + top] = scored.top_logprobs.view(torch.int32)


def _fill_sampling(state: SamplingState[HostArray], row: int, chunk: Chunk) -> None:
    sampling = chunk.sampling
    state.temperature[row] = sampling.temperature if sampling.temperature >= LEAST_TEMPERATURE else 0.0
    state.top_k[row] = sampling.top_k
    state.top_p[row] = sampling.top_p
    state.min_p[row] = sampling.min_p
    state.repetition_penalty[row] = sampling.repetition_penalty
    state.frequency_penalty[row] = sampling.frequency_penalty
    state.presence_penalty[row] = sampling.presence_penalty
    state.seed[row] = np.array([sampling.seed], np.uint64).view(np.int32)
    state.prompt_tokens[row] = chunk.prompt_tokens
    state.logprobs[row] = 0 if sampling.logprobs is None else 1 + sampling.logprobs
    # SamplingParams holds at most MAX_LOGIT_BIAS and MAX_STOP_TOKENS of these, whose sum is BIAS_ENTRIES.
    entries = [(token, value, np.iinfo(np.int32).max) for token, value in sampling.logit_bias.items()]
    if sampling.min_tokens > 0 and not sampling.grammar:  # else the masks see to it: they know what else may come
        first_stop = chunk.prompt_tokens + sampling.min_tokens
        entries += [(token, -np.inf, first_stop) for token in sampling.stop_token_ids]
    state.bias_ids[row] = state.bias_values[row] = state.bias_until[row] = 0
    for index, (token, value, until) in enumerate(entries):
        state.bias_ids[row, index], state.bias_values[row, index], state.bias_until[row, index] = token, value, until


def _views(words: Any, module: Any) -> Allocate[Any]:
    """Hands out consecutive ranges of int32 words, a torch tensor or a numpy array (`module`), as 4-byte arrays."""
    end = 0

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        nonlocal end
        begin, end = end, end + math.prod(shape)
        return words[begin:end].view(getattr(module, dtype)).reshape(shape)

    return allocate
