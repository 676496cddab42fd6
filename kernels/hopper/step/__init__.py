"""The start and the end of a step on Hopper: `kernels.reference.advance` and `emit`, one kernel each (step.cu)."""

from pathlib import Path

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module

THREADS = 128


def advance(
    slots: Tensor, positions: Tensor, new_pages: Tensor, page_table: Tensor, last_token: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.reference.advance`; every tensor int32 and contiguous."""
    _check(slots, positions, new_pages, page_table, last_token)
    rows, width = slots.shape[0], page_table.shape[1]
    tokens, following = torch.empty_like(slots), torch.empty_like(slots)
    arguments = (slots, positions, new_pages, page_table, last_token, tokens, following, rows, width)
    _kernel("advance").launch(grid=(-(-rows // THREADS), 1, 1), block=THREADS, args=arguments)
    return tokens, following


def emit(
    slots: Tensor,
    tokens: Tensor,
    logprob: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    last_token: Tensor,
    output_counts: Tensor,
    outputs: Tensor,
) -> None:
    """`kernels.reference.emit`; logprob and top_logprobs float32, the others int32, all contiguous."""
    logprob, top_logprobs = logprob.view(torch.int32), top_logprobs.view(torch.int32)
    _check(slots, tokens, logprob, top_ids, top_logprobs, last_token, output_counts, outputs)
    (rows, top), vocab, width = top_ids.shape, output_counts.shape[1], outputs.shape[1]
    arguments = (
        slots,
        tokens,
        logprob,
        top_ids,
        top_logprobs,
        last_token,
        output_counts,
        outputs,
        rows,
        top,
        vocab,
        width,
    )
    _kernel("emit").launch(grid=(-(-rows * 32 // THREADS), 1, 1), block=THREADS, args=arguments)


def _check(*tensors: Tensor) -> None:
    if any(tensor.dtype != torch.int32 or not tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"a step's state is contiguous int32, not {[(t.dtype, t.stride()) for t in tensors]}")


def _kernel(name: str) -> Kernel:
    return compile_module(Path(__file__).with_name("step.cu")).kernel(name)
