"""One object that owns every tensor a captured step reads or writes between steps.

Three kinds: key/value pages; state by slot (page table, sampling parameters, last token, token counts), which prefill
installs and decode only names; and the packed words that cross between host and device, one block each way a step.
Knows shapes, slots and pages; no requests, no weights.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conf.limits import BIAS_ENTRIES, MAX_TOP_LOGPROBS, PAGE_TOKENS, SCRATCH_PAGE
from graphs.buckets import Bucket, Buckets
from graphs.plan import NO_PAGE, DecodeStep, PrefillStep, Step

# One request's sampling parameters: the shape and dtype of a slot's row, on the host, in the packed words and by slot.
SAMPLING = {
    "temperature": ((), "float32"),
    "top_k": ((), "int32"),
    "top_p": ((), "float32"),
    "min_p": ((), "float32"),
    "repetition_penalty": ((), "float32"),
    "frequency_penalty": ((), "float32"),
    "presence_penalty": ((), "float32"),
    "seed": ((2,), "int32"),  # low and high word
    "prompt_tokens": ((), "int32"),
    "bias_ids": ((BIAS_ENTRIES,), "int32"),
    "bias_values": ((BIAS_ENTRIES,), "float32"),
    "bias_until": ((BIAS_ENTRIES,), "int32"),  # the entry counts for tokens drawn before this position
}
SAMPLING_AS_GIVEN = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
OUTPUT_WORDS = 2 + 2 * MAX_TOP_LOGPROBS  # token, its log probability, the ids and the values of the best


class Sampled(NamedTuple):
    """What one step drew, by row, on the host."""

    tokens: list[int]
    logprobs: np.ndarray  # [rows] float32
    top_ids: np.ndarray  # [rows, MAX_TOP_LOGPROBS] int32
    top_logprobs: np.ndarray  # [rows, MAX_TOP_LOGPROBS] float32


class Inputs(SimpleNamespace):
    """The fields of a step's packed words, as views: numpy on the host, torch on the device.

    decode, all [rows]: slots, positions, new_pages.
    prefill: tokens, positions, slots [tokens]; sequence_slots (the spare slot where there is no chunk), sample_slots
    (the spare slot where the chunk draws no token), starts, last (index of the chunk's last token) [sequences];
    page_table [sequences, pages of a context]; and SAMPLING [sequences, ...].
    """


class Staging(NamedTuple):
    """The host's end of a step's transfers, pinned where there is a GPU."""

    words: Tensor  # int32
    inputs: dict[Bucket, Inputs]
    outputs: Tensor  # [rows, OUTPUT_WORDS] int32


class Buffers:
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
        """`pages` counts the scratch page; kv_heads are this rank's."""
        slots = buckets.max_rows + 1
        self.buckets = buckets
        self.spare_slot = buckets.max_rows
        self.context_pages = max_context // PAGE_TOKENS
        self.device = device
        shape = (layers, pages, kv_heads, PAGE_TOKENS, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.page_table = torch.zeros(slots, self.context_pages, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device)
        self.output_counts = torch.zeros(slots, vocab, dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros(slots, vocab, dtype=torch.uint8, device=device)
        self.sampling = SimpleNamespace(
            **{
                name: torch.zeros(slots, *shape, dtype=getattr(torch, dtype), device=device)
                for name, (shape, dtype) in SAMPLING.items()
            }
        )
        self._fields = {bucket: self._fields_of(bucket) for bucket in buckets.all}
        self._words = {bucket: sum(size for *_, size in _sizes(fields)) for bucket, fields in self._fields.items()}
        self.max_words = max(self._words.values())
        self.words = torch.zeros(self.max_words, dtype=torch.int32, device=device)
        self.inputs = {bucket: _carve(self.words, fields) for bucket, fields in self._fields.items()}
        self.outputs = torch.zeros(buckets.max_sequences, OUTPUT_WORDS, dtype=torch.int32, device=device)

    @staticmethod
    def page_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * PAGE_TOKENS * head_dim * dtype.itemsize

    def _fields_of(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], str]]:
        tokens, sequences = (bucket.tokens,), (bucket.sequences,)
        if bucket.kind == "decode":
            return dict.fromkeys(("slots", "positions", "new_pages"), (tokens, "int32"))
        by_sequence = ("sequence_slots", "sample_slots", "starts", "last")
        return {
            **dict.fromkeys(("tokens", "positions", "slots"), (tokens, "int32")),
            **dict.fromkeys(by_sequence, (sequences, "int32")),
            "page_table": ((bucket.sequences, self.context_pages), "int32"),
            **{name: (sequences + shape, dtype) for name, (shape, dtype) in SAMPLING.items()},
        }

    # On the host -----------------------------------------------------------------------------------------------------

    def staging(self) -> Staging:
        pinned = self.device.type == "cuda"
        words = torch.zeros(self.max_words, dtype=torch.int32, pin_memory=pinned)
        inputs = {bucket: _carve(words.numpy(), fields) for bucket, fields in self._fields.items()}
        outputs = torch.zeros(self.outputs.shape, dtype=torch.int32, pin_memory=pinned)
        return Staging(words, inputs, outputs)

    def words_of(self, bucket: Bucket) -> int:
        """int32 words of the packed inputs of a bucket."""
        return self._words[bucket]

    def fill(self, step: Step, bucket: Bucket, staging: Staging) -> None:
        """Pack a step into the host's words. Raises ValueError where it does not fit the bucket."""
        inputs = staging.inputs[bucket]
        if isinstance(step, DecodeStep):
            rows = len(step.slots)
            if bucket.kind != "decode" or rows > bucket.tokens:
                raise ValueError(f"{rows} decode rows do not fit {bucket}")
            inputs.slots[:rows], inputs.slots[rows:] = step.slots, self.spare_slot
            inputs.positions[:rows], inputs.positions[rows:] = step.positions, 0
            inputs.new_pages[:rows], inputs.new_pages[rows:] = step.new_pages, NO_PAGE
        else:
            self._fill_prefill(step, bucket, inputs)

    def _fill_prefill(self, step: PrefillStep, bucket: Bucket, inputs: Inputs) -> None:
        if bucket.kind != "prefill" or step.tokens > bucket.tokens or len(step.chunks) > bucket.sequences:
            raise ValueError(f"{len(step.chunks)} chunks of {step.tokens} tokens do not fit {bucket}")
        end = 0
        inputs.page_table[:] = SCRATCH_PAGE
        for row, chunk in enumerate(step.chunks):
            begin, end = end, end + len(chunk.tokens)
            inputs.tokens[begin:end] = chunk.tokens
            inputs.positions[begin:end] = np.arange(chunk.start, chunk.start + len(chunk.tokens))
            inputs.slots[begin:end] = chunk.slot
            inputs.sequence_slots[row] = chunk.slot
            inputs.sample_slots[row] = chunk.slot if chunk.samples else self.spare_slot
            inputs.starts[row] = chunk.start
            inputs.last[row] = end - 1
            inputs.page_table[row, : len(chunk.pages)] = chunk.pages
            _fill_sampling(inputs, row, chunk)
        inputs.tokens[end:], inputs.positions[end:], inputs.slots[end:] = 0, 0, self.spare_slot
        spare = slice(len(step.chunks), None)
        inputs.sequence_slots[spare] = inputs.sample_slots[spare] = self.spare_slot
        inputs.starts[spare], inputs.last[spare] = 0, 0
        for name in SAMPLING:
            getattr(inputs, name)[spare] = 0

    @staticmethod
    def sampled(staging: Staging, rows: int) -> Sampled:
        """What a finished step left in the host's words."""
        columns = staging.outputs.numpy()[:rows]
        split = 2 + MAX_TOP_LOGPROBS
        return Sampled(
            columns[:, 0].tolist(),
            columns[:, 1].view(np.float32),
            columns[:, 2:split],
            columns[:, split:].view(np.float32),
        )

    # On the device, inside the captured step -------------------------------------------------------------------------

    def install(self, inputs: Inputs) -> None:
        """Prefill: write each chunk's page table row, sampling parameters and token counts to its slot."""
        rows, state = inputs.sequence_slots, self.sampling
        self.page_table[rows] = inputs.page_table
        for name in SAMPLING:
            getattr(state, name)[rows] = getattr(inputs, name)
        fresh = (inputs.starts == 0).unsqueeze(1)  # the first chunk forgets who had the slot before
        self.output_counts[rows] = self.output_counts[rows].masked_fill(fresh, 0)
        self.in_prompt[rows] = self.in_prompt[rows].masked_fill(fresh, 0)
        prompt = inputs.positions < state.prompt_tokens[inputs.slots]
        at = inputs.slots.long() * self.in_prompt.shape[1] + inputs.tokens
        self.in_prompt.view(-1).scatter_reduce_(0, at, prompt.byte(), "amax")
        self.output_counts.view(-1).scatter_add_(0, at, (~prompt).int())


def _fill_sampling(inputs: Inputs, row: int, chunk) -> None:
    sampling = chunk.sampling
    for name in SAMPLING_AS_GIVEN:
        getattr(inputs, name)[row] = getattr(sampling, name)
    inputs.seed[row] = np.array([sampling.seed], np.uint64).view(np.int32)
    inputs.prompt_tokens[row] = chunk.prompt_tokens
    entries = [(token, value, np.iinfo(np.int32).max) for token, value in sampling.logit_bias.items()]
    if sampling.min_tokens > 0:
        first_stop = chunk.prompt_tokens + sampling.min_tokens
        entries += [(token, -np.inf, first_stop) for token in sampling.stop_token_ids]
    inputs.bias_ids[row] = inputs.bias_values[row] = inputs.bias_until[row] = 0
    for index, (token, value, until) in enumerate(entries):
        inputs.bias_ids[row, index], inputs.bias_values[row, index] = token, value
        inputs.bias_until[row, index] = until


def _sizes(fields: dict) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    for name, (shape, dtype) in fields.items():
        yield name, shape, dtype, int(np.prod(shape))


def _carve(words, fields: dict) -> Inputs:
    """Consecutive views into int32 words, a torch tensor or a numpy array, by field."""
    module, views, offset = (torch if isinstance(words, Tensor) else np), {}, 0
    for name, shape, dtype, size in _sizes(fields):
        views[name] = words[offset : offset + size].view(getattr(module, dtype)).reshape(shape)
        offset += size
    return Inputs(**views)
