"""From logits to the next token on Hopper: `kernels.reference.sample` as one kernel.

How it works is written in sampler.cu. Knows tensors; what fills the state of a slot is the caller's business.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernels.build import load_kernel
from kernels.hopper.exchange import exchange_arguments, one_shot_rows
from kernels.ops import Peers, Sampled, SamplingState, TokenCounts, TokenMasks, TokenPlaces

FOLDER = Path(__file__).parent
ROW_BLOCKS = 8  # of a row: a cluster
THREADS = 512  # of a block, two of which share a multiprocessor
COLUMNS = 2 * THREADS  # of a block's range
LEVELS, BINS = 5, 256  # digits of a filter's search, and the histogram of each
LISTED = 1024  # logits that a search lists
MOST_TOP = 32  # of the likeliest tokens: as many half warps as a block has
SHARED_LIMIT = 212 * 1024  # bytes of dynamic shared memory; the kernel's fixed part is below 15 KB of a block's 227


def sample(
    logits: Tensor,
    tokens: TokenPlaces,
    state: SamplingState[Tensor],
    counts: TokenCounts,
    masks: TokenMasks,
    top: int,
    peers: Peers,
) -> Sampled:
    """Draw a token for each row, as `KernelSet.sample` says: logits [R, N] bf16 or float32, contiguous.

    A row's bytes do not depend on the others, and are the same on every rank. Raises ValueError for arguments that the
    kernel does not take.
    """
    rows, columns = logits.shape
    vocab = counts.output.shape[1]
    if logits.dtype not in (torch.bfloat16, torch.float32) or not logits.is_contiguous():
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}: contiguous bfloat16 or float32 can be sampled")
    if not 1 <= top <= min(vocab, MOST_TOP):
        raise ValueError(f"top {top}: between 1 and {min(vocab, MOST_TOP)} of the likeliest tokens can be had")
    if columns * peers.size < vocab:
        raise ValueError(f"logits {tuple(logits.shape)} of {peers.size} ranks are too few for {vocab} tokens")
    if masks.words.shape[1] != -(-vocab // 32) or not masks.words.is_contiguous():
        raise ValueError(f"masks {tuple(masks.words.shape)}: contiguous ones of {-(-vocab // 32)} words are taken")
    first = min(peers.rank * columns, vocab)
    device = logits.device
    sampled = Sampled(
        tokens=torch.empty(rows, dtype=torch.int32, device=device),
        logprobs=torch.empty(rows, dtype=torch.float32, device=device),
        top_ids=torch.empty(rows, top, dtype=torch.int32, device=device),
        top_logprobs=torch.empty(rows, top, dtype=torch.float32, device=device),
    )
    range_size, shared_bytes = layout(columns, top)
    if rows:
        aligned = columns % 2 == 0 and logits.data_ptr() % (2 * logits.element_size()) == 0
        macros = defines(logits.dtype, top, state.bias_ids.shape[1], peers.size, aligned)
        kernel = load_kernel(FOLDER / "sampler.cu", "sample", macros, shared_bytes)
        needed = 8 * exchange_words(top) * one_shot_rows(rows, peers.size)
        kernel.launch(
            grid=(ROW_BLOCKS, rows, 1),
            block=THREADS,
            args=(
                logits,
                tokens.slots,
                tokens.positions,
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
                state.logprobs,
                counts.output,
                counts.in_prompt,
                masks.rows,
                masks.words,
                *sampled,
                vocab,
                range_size,
                first,
                min(columns, vocab - first),
                columns,
                *exchange_arguments(peers, peers.sampler, needed),
            ),
        )
    return sampled


def defines(dtype: torch.dtype, top: int, bias_entries: int, ranks: int, aligned: bool) -> dict[str, int]:
    """The macros of sampler.cu. aligned: every row of logits begins at a multiple of two logits' bytes."""
    return {
        "BF16": int(dtype == torch.bfloat16),
        "PAIRED": int(aligned),
        "TOP": top,
        "BIAS_ENTRIES": bias_entries,
        "RANKS": ranks,
        "ROW_BLOCKS": ROW_BLOCKS,
        "THREADS": THREADS,
        "LEVELS": LEVELS,
        "BINS": BINS,
        "LISTED": LISTED,
        "WORDS": exchange_words(top),
    } | {f"WORD_{name}": place for name, place in word_places(top).items()}


def word_places(top: int) -> dict[str, int]:
    """Where a row's words of 8 bytes lie in the exchange area, after the histograms of top_k's and top_p's searches."""
    histograms = 2 * LEVELS * BINS
    best = histograms + 1
    return {"PEAK": histograms, "BEST": best, "SUM": best + top, "DRAWN": best + top + 1, "LOGIT": best + top + 2}


def exchange_words(top: int) -> int:
    """Words that a rank sends of a row."""
    return word_places(top)["LOGIT"] + 1


def layout(vocab: int, top: int) -> tuple[int, int]:
    """Tokens of a block's range, in whole warps, and bytes of dynamic shared memory: its logits and scratch space.

    That is for the tokens of `top` threads, or a search's histograms and list. Raises ValueError where a range does not
    fit a block.
    """
    range_size = -(-vocab // (ROW_BLOCKS * 32)) * 32
    keys = 8 * top * max(16, 2 * -(-range_size // COLUMNS))
    shared_bytes = 4 * range_size + max(keys, 2 * 8 * BINS + 4 * LISTED)
    if shared_bytes > SHARED_LIMIT:
        raise ValueError(
            f"a vocabulary of {vocab} takes {shared_bytes} bytes of shared memory a block, more than {SHARED_LIMIT}"
        )
    return range_size, shared_bytes
