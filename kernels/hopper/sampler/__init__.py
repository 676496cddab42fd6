"""From logits to the next token on Hopper: `kernels.reference.sample` as one kernel.

How it works is written in sampler.cu. Knows tensors; what fills the state of a slot is the caller's business.
"""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module
from kernels.hopper.peers import Peers

BLOCKS = 8  # of a row: a cluster
THREADS = 1024
SHARED_LIMIT = 212 * 1024  # bytes of dynamic shared memory; the kernel's fixed part is below 15 KB of a block's 227


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    state: SimpleNamespace,
    output_counts: Tensor,
    in_prompt: Tensor,
    top: int,
    peers: Peers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a token for each row: logits [R, N] bf16 or float32, slots [R], positions [R] int32 of the tokens to draw.

    A rank's logits are those of tokens rank * N, rank * N + 1, ...: columns past the vocabulary V are not read.
    state: the sampling parameters by slot, with the names of graphs.buffers.SAMPLING; output_counts [slots, V] int32;
    in_prompt [slots, V] uint8. -> tokens [R] int32, their log probability [R] float32 under the raw logits, and ids
    [R, top] int32 and values [R, top] float32 of the likeliest tokens, of equal ones the lower id first. A row's bytes
    do not depend on the others, and are the same on every rank.
    """
    rows, columns = logits.shape
    vocab = output_counts.shape[1]
    if logits.dtype not in (torch.bfloat16, torch.float32) or not logits.is_contiguous() or not 1 <= top <= vocab:
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype}, top {top}: contiguous bfloat16 or float32 with "
            f"1 <= top <= {vocab} is what can be sampled"
        )
    if columns * peers.size < vocab:
        raise ValueError(f"logits {tuple(logits.shape)} of {peers.size} ranks are too few for {vocab} tokens")
    first = min(peers.rank * columns, vocab)
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    top_ids = torch.empty(rows, top, dtype=torch.int32, device=device)
    top_logprobs = torch.empty(rows, top, dtype=torch.float32, device=device)
    part, shared_bytes = layout(columns, top)
    if rows:
        kernel = _kernel(logits.dtype, top, state.bias_ids.shape[1], peers.size, shared_bytes)
        area = peers.sampler.arguments(8 * (2 * 5 * 256 + top + 4) * peers.size * rows)  # sampler.cu's words
        kernel.launch(
            grid=(BLOCKS, rows, 1),
            block=THREADS,
            args=(
                logits,
                slots,
                positions,
                state.temperature,
                state.top_k,
                state.top_p,
                state.min_p,
                state.repetition_penalty,
                state.frequency_penalty,
                state.presence_penalty,
                state.seed,
                state.bias_ids,
                state.bias_values,
                state.bias_until,
                output_counts,
                in_prompt,
                tokens,
                logprobs,
                top_ids,
                top_logprobs,
                vocab,
                part,
                first,
                min(columns, vocab - first),
                columns,
                *area,
            ),
        )
    return tokens, logprobs, top_ids, top_logprobs


def layout(vocab: int, top: int) -> tuple[int, int]:
    """Tokens of a block's part, in whole warps, and bytes of dynamic shared memory: its logits and the candidates.

    The candidates are all tokens of `top` threads. Raises ValueError where a part does not fit a block.
    """
    part = -(-vocab // (BLOCKS * 32)) * 32
    shared_bytes = 4 * part + 8 * top * -(-part // THREADS)
    if shared_bytes > SHARED_LIMIT:
        raise ValueError(
            f"a vocabulary of {vocab} takes {shared_bytes} bytes of shared memory a block, more than {SHARED_LIMIT}"
        )
    return part, shared_bytes


@cache
def _kernel(dtype: torch.dtype, top: int, bias_entries: int, ranks: int, shared_bytes: int) -> Kernel:
    defines = {"BF16": int(dtype == torch.bfloat16), "TOP": top, "BIAS_ENTRIES": bias_entries, "RANKS": ranks}
    return compile_module(Path(__file__).with_name("sampler.cu"), defines).kernel("sample", shared_bytes=shared_bytes)
