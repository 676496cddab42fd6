"""Log probabilities of given tokens on Hopper: `kernels.reference.score` as one kernel over a tile of logits.

How it works is written in scorer.cu. Knows tensors; whose tokens they are is the caller's business.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernels.build import load_kernel
from kernels.hopper.exchange import exchange_arguments, one_shot_rows
from kernels.ops import Peers, Scored

FOLDER = Path(__file__).parent
THREADS = 1024  # of a block, which takes a row
CHUNK = 8  # logits that a thread loads at once
MOST_TOP = 32  # of the likeliest tokens: a block has as many warps


def score(logits: Tensor, targets: Tensor, first_row: int, vocab: int, top: int, peers: Peers) -> Scored:
    """As `KernelSet.score` says: logits [R, N] bf16, contiguous, N a multiple of 8.

    A row's bytes do not depend on the others, and are the same on every rank. Raises ValueError for arguments that the
    kernel does not take.
    """
    rows, columns = logits.shape
    aligned = columns % CHUNK == 0 and logits.data_ptr() % 16 == 0
    if logits.dtype != torch.bfloat16 or not logits.is_contiguous() or not aligned:
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype}: contiguous, 16-byte aligned bfloat16 [R, N] with N a "
            f"multiple of {CHUNK} can be scored"
        )
    if targets.dtype != torch.int32 or targets.shape != (rows,) or not targets.is_contiguous():
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype}: contiguous int32 [{rows}] belong to these")
    if not 1 <= top <= min(vocab, MOST_TOP):
        raise ValueError(f"top {top}: between 1 and {min(vocab, MOST_TOP)} of the likeliest tokens can be had")
    if columns * peers.size < vocab:
        raise ValueError(f"logits {tuple(logits.shape)} of {peers.size} ranks are too few for {vocab} tokens")
    first = min(peers.rank * columns, vocab)
    device = logits.device
    scored = Scored(
        ranks=torch.empty(rows, dtype=torch.int32, device=device),
        logprobs=torch.empty(rows, dtype=torch.float32, device=device),
        top_ids=torch.empty(rows, top, dtype=torch.int32, device=device),
        top_logprobs=torch.empty(rows, top, dtype=torch.float32, device=device),
    )
    if rows:
        kernel = load_kernel(FOLDER / "scorer.cu", "score", defines(top, peers.size), shared_bytes(columns, top))
        needed = 8 * exchange_words(top) * one_shot_rows(first_row + rows, peers.size)
        kernel.launch(
            grid=(rows, 1, 1),
            block=THREADS,
            args=(
                logits,
                targets,
                *scored,
                first,
                min(columns, vocab - first),
                columns,
                first_row,
                *exchange_arguments(peers, peers.scorer, needed),
            ),
        )
    return scored


def defines(top: int, ranks: int) -> dict[str, int]:
    """The macros of scorer.cu."""
    return {
        "TOP": top,
        "RANKS": ranks,
        "THREADS": THREADS,
        "CHUNK": CHUNK,
        "WORDS": exchange_words(top),
        "WORD_TARGET": top,
        "WORD_GREATER": top + 1,
        "WORD_SUM": top + 2,
    }


def exchange_words(top: int) -> int:
    """Words of 8 bytes that a rank sends of a row."""
    return top + 3


def shared_bytes(columns: int, top: int) -> int:
    """Bytes of dynamic shared memory: room for all tokens of `top` threads, or the best of `top` warps' threads."""
    of_thread = CHUNK * -(-columns // (CHUNK * THREADS))
    return 8 * top * max(of_thread, 32)
