"""The exchange areas through which the ranks' kernels add up partial sums: memory that every rank can write to.

common/exchange.cuh explains who writes what and when, and why no flags are needed. Knows bytes and addresses.
"""

import os
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from kernels.hopper import scorer
from kernels.hopper.exchange import one_shot_rows, two_shot_rows
from kernels.hopper.sampler import MOST_TOP, exchange_words
from kernels.ops import ExchangeArea, Peers, Ranks, UnsupportedError

EMPTY = 0xFF  # every byte of a word that no rank has written


def join(
    ranks: Ranks, decode_rows: int, prefill_tokens: int, sequences: int, scored: int, hidden: int, device: torch.device
) -> Peers:
    """Share memory with the other ranks: all of them must call this.

    decode_rows, prefill_tokens, sequences, scored: the most that a step has; a kernel refuses more. Raises
    UnsupportedError where the GPUs cannot reach each other's memory, or where the areas would be too large.
    """
    size = ranks.size
    if size == 1:
        return Peers(ranks)
    rows = max(one_shot_rows(decode_rows, size), two_shot_rows(prefill_tokens, size))
    sampled = 8 * exchange_words(MOST_TOP) * one_shot_rows(max(decode_rows, sequences), size)
    of_scored = 8 * scorer.exchange_words(scorer.MOST_TOP) * one_shot_rows(scored, size)
    sizes = [2 * hidden * rows, 2 * hidden * rows, sampled, of_scored]  # bytes, in the order of the fields of Peers
    if sum(sizes) >= 2**31:  # kernels take offsets as int32
        raise UnsupportedError(
            "prefill_tokens", prefill_tokens, f"fewer with {size} ranks: they exchange through 2 GiB at most"
        )
    for other in range(min(size, torch.cuda.device_count())):
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            raise UnsupportedError("ranks", size, f"1, as GPU {device.index} cannot access GPU {other}'s memory")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here multicasts
    own = symmetric_memory.empty(sum(sizes), dtype=torch.uint8, device=device)
    group = dist.group.WORLD
    assert group is not None  # `ranks` joined it
    shared = symmetric_memory.rendezvous(own, group)
    own.fill_(EMPTY)
    torch.cuda.synchronize()
    ranks.smallest(0)  # nobody writes before all areas are empty
    addresses = [shared.get_buffer(peer, own.shape, own.dtype).data_ptr() for peer in range(size)]
    memories = torch.tensor(addresses, device=device)
    offsets = accumulate(sizes[:-1], initial=0)
    attention, mlp, of_sampler, of_scorer = (ExchangeArea(memories, *area) for area in zip(offsets, sizes, strict=True))
    return Peers(ranks, attention, mlp, of_sampler, of_scorer, mapped=(own, shared))
