"""The start and the end of a step on Hopper: `kernels.reference.install`, `advance` and `emit`, one kernel each."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from kernels.build import load_kernel
from kernels.ops import Chunks, KvPages, Sampled, SamplingState, TokenCounts, TokenPlaces

FOLDER = Path(__file__).parent
THREADS = 128  # of a block
INSTALL_THREADS, INSTALL_PARTS = 256, 8  # of a block; blocks of a chunk


def install(
    chunks: Chunks,
    tokens: Tensor,
    places: TokenPlaces,
    table: Tensor,
    state: SamplingState[Tensor],
    counts: TokenCounts,
) -> Tensor:
    """As `KernelSet.install` says; tensors contiguous. Raises ValueError otherwise."""
    given, kept = (
        [getattr(sampling, field.name).view(torch.int32) for field in fields(SamplingState)]
        for sampling in (chunks.sampling, state)
    )
    slots, starts, last, page_table, _ = chunks
    _check(slots, starts, last, page_table, *given, tokens, places.positions, table, *kept, counts.output)
    (sequences, table_width), vocab = page_table.shape, counts.output.shape[1]
    if counts.in_prompt.dtype != torch.uint8 or not counts.in_prompt.is_contiguous():
        raise ValueError(f"in_prompt {counts.in_prompt.dtype} {counts.in_prompt.stride()}: contiguous uint8 is counted")
    next_positions = torch.empty_like(last)
    arguments = (
        slots,
        starts,
        last,
        page_table,
        *given,
        tokens,
        places.positions,
        table,
        *kept,
        counts.output,
        counts.in_prompt,
        next_positions,
        table_width,
        vocab,
    )
    kernel = load_kernel(FOLDER / "install.cu", "install", install_defines(state.bias_ids.shape[1]))
    kernel.launch(grid=(INSTALL_PARTS, sequences, 1), block=INSTALL_THREADS, args=arguments)
    return next_positions


def advance(tokens: TokenPlaces, new_pages: Tensor, pages: KvPages, last_token: Tensor) -> tuple[Tensor, Tensor]:
    """As `KernelSet.advance` says; tensors contiguous. Raises ValueError otherwise."""
    _check(tokens.slots, tokens.positions, new_pages, pages.table, last_token)
    rows, table_width, page = tokens.slots.shape[0], pages.table.shape[1], pages.keys.shape[2]
    computed, next_positions = torch.empty_like(tokens.slots), torch.empty_like(tokens.slots)
    arguments = (
        tokens.slots,
        tokens.positions,
        new_pages,
        pages.table,
        last_token,
        computed,
        next_positions,
        rows,
        table_width,
    )
    kernel = load_kernel(FOLDER / "advance.cu", "advance", advance_defines(page))
    kernel.launch(grid=(-(-rows // THREADS), 1, 1), block=THREADS, args=arguments)
    return computed, next_positions


def emit(sampled: Sampled, slots: Tensor, last_token: Tensor, counts: TokenCounts, outputs: Tensor) -> None:
    """As `KernelSet.emit` says; tensors contiguous. Raises ValueError otherwise."""
    logprobs, top_logprobs = sampled.logprobs.view(torch.int32), sampled.top_logprobs.view(torch.int32)
    _check(slots, sampled.tokens, logprobs, sampled.top_ids, top_logprobs, last_token, counts.output, outputs)
    (rows, top), vocab, width = sampled.top_ids.shape, counts.output.shape[1], outputs.shape[1]
    arguments = (
        slots,
        sampled.tokens,
        logprobs,
        sampled.top_ids,
        top_logprobs,
        last_token,
        counts.output,
        outputs,
        rows,
        top,
        vocab,
        width,
    )
    kernel = load_kernel(FOLDER / "emit.cu", "emit", emit_defines())
    kernel.launch(grid=(-(-rows * 32 // THREADS), 1, 1), block=THREADS, args=arguments)


def install_defines(bias_entries: int) -> dict[str, int]:
    """The macros of install.cu, for rows of `bias_entries` biases."""
    return {"BIAS_ENTRIES": bias_entries, "PARTS": INSTALL_PARTS, "THREADS": INSTALL_THREADS}


def advance_defines(page: int) -> dict[str, int]:
    """The macros of advance.cu, for pages of `page` tokens."""
    return {"PAGE": page, "THREADS": THREADS}


def emit_defines() -> dict[str, int]:
    """The macros of emit.cu."""
    return {"THREADS": THREADS}


def _check(*tensors: Tensor) -> None:
    if any(tensor.dtype != torch.int32 or not tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"a step's state is contiguous int32, not {[(t.dtype, t.stride()) for t in tensors]}")
