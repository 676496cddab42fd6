"""RoPE with the append of keys and values, and attention over pages: how attention.cu is launched.

The functions of `kernels.reference` of the same names, for bfloat16, head dimension 64 and pages of 64 tokens. Knows
shapes and the scratch memory that attention needs; the reasons for both kernels' layout are in attention.cu.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module

DIM = 64
PAGE = 64
THREADS = 128
SPLIT_PAGES = 4  # in the smallest split
MOST_SPLITS = 64  # of a token; longer contexts have larger splits, twice and twice again
MOST_SPLIT_PAGES = 128
MOST_SPLIT_TOKENS = 256  # with more, a block takes a (token, kv head) whole
BLOCKS = 3  # share a multiprocessor
SHARED_BYTES = 4 * 2 * PAGE * DIM * 2  # a page of keys and one of values for each of four warps
EVERY_KEY = 2**31 - 1  # a window that hides nothing


class Plan(NamedTuple):
    """How a launch divides its work; known from shapes alone."""

    whole: bool  # a block takes all splits of a (token, kv head), one after the other
    most: int  # splits of a token
    blocks: int
    owners: int  # places for the splits of one (token, kv head) in scratch memory


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor, keys: Tensor,
    values: Tensor,
) -> Tensor:
    """`kernels.reference.rope_append`, byte for byte. Raises ValueError for other shapes and types than Hopper's."""
    kv_heads = _kv_heads(keys, values)
    rows = qkv.shape[1] // DIM  # of 64 in a token: queries, keys, values
    heads = rows - 2 * kv_heads
    if qkv.shape[1] % DIM:
        raise ValueError(f"qkv has {qkv.shape[1]} columns, not a multiple of {DIM}")
    group = _group(heads, kv_heads)
    _check(torch.bfloat16, qkv=qkv)
    _check(torch.float32, cos=cos, sin=sin)
    _check(torch.int32, positions=positions, slots=slots, page_table=page_table)
    if cos.shape != sin.shape or cos.shape[1] != DIM // 2:
        raise ValueError(f"cos and sin are {list(cos.shape)} and {list(sin.shape)}, not [positions, {DIM // 2}]")
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, heads, DIM)
    blocks = -(-tokens * rows * 4 // THREADS)  # four threads a row
    args = (qkv, cos, sin, positions, slots, page_table, keys, values, q, tokens, heads, kv_heads, page_table.shape[1])
    _kernel("rope_append", group).launch(grid=(blocks, 1, 1), block=THREADS, args=args)
    return q


def attention(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, slots: Tensor, positions: Tensor, sinks: Tensor,
    window: int | None,
) -> Tensor:
    """`kernels.reference.attention`. Raises ValueError for other shapes and types than Hopper's.

    A token's bytes depend on nothing but its own query, keys and values. The first call on a device for a number of kv
    heads must be outside a graph's capture: it allocates counters that outlive graphs.
    """
    tokens, heads, dim = q.shape
    kv_heads = _kv_heads(keys, values)
    group = _group(heads, kv_heads)
    if dim != DIM:
        raise ValueError(f"head dimension {dim}: Hopper's attention has {DIM}")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a token sees at least itself")
    _check(torch.bfloat16, q=q)
    _check(torch.int32, positions=positions, slots=slots, page_table=page_table)
    _check(torch.float32, sinks=sinks)
    width = page_table.shape[1]
    plan = plan_of(tokens, kv_heads, width, window, _multiprocessors(q.device.index))
    partial = peaks = counters = None
    if plan.most > 1:
        partial = torch.empty(plan.owners, plan.most, group, DIM, dtype=torch.float32, device=q.device)
        peaks = torch.empty(plan.owners, plan.most, group, 2, dtype=torch.float32, device=q.device)
        if not plan.whole:
            counters = _counters(q.device.index, kv_heads)
    out = q.new_empty(tokens, heads * DIM)
    args = (
        q, keys, values, page_table, slots, positions, sinks, out, partial, peaks, counters, tokens, kv_heads, width,
        window or EVERY_KEY, int(plan.whole), plan.most,
    )
    _kernel("attention", group, SHARED_BYTES).launch(grid=(plan.blocks, 1, 1), block=THREADS, args=args)
    return out


def plan_of(tokens: int, kv_heads: int, width: int, window: int | None, multiprocessors: int) -> Plan:
    """The plan for `tokens` tokens and page table rows of `width` entries.

    Scratch memory holds owners * most splits of 66 floats a query head: at 64 heads, a width of 2048 and 256 tokens
    277 MB, the most there is.
    """
    pages = width if window is None else min(width, (window + PAGE - 2) // PAGE + 1)  # a window ends anywhere in a page
    if pages > MOST_SPLITS * MOST_SPLIT_PAGES:
        raise ValueError(f"{pages} pages a token: at most {MOST_SPLITS * MOST_SPLIT_PAGES}")
    most = min(-(-pages // SPLIT_PAGES), MOST_SPLITS)
    whole = most == 1 or tokens > MOST_SPLIT_TOKENS
    units = tokens * kv_heads
    blocks = min(units if whole else units * most, BLOCKS * multiprocessors)
    return Plan(whole, most, blocks, blocks if whole else units)


def _kernel(name: str, group: int, shared_bytes: int = 0) -> Kernel:
    return compile_module(Path(__file__).with_name("attention.cu"), {"GROUP": group}).kernel(name, shared_bytes)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _counters(device: int, kv_heads: int) -> Tensor:
    """Finished splits by (token, kv head): zero between launches, since the last split to finish takes them back."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention: the first call on a device must be outside a graph's capture")
    return torch.zeros(MOST_SPLIT_TOKENS, kv_heads, dtype=torch.int32, device=torch.device("cuda", device))


def _kv_heads(keys: Tensor, values: Tensor) -> int:
    _check(torch.bfloat16, keys=keys, values=values)
    if keys.shape != values.shape or keys.shape[2:] != (PAGE, DIM):
        raise ValueError(
            f"keys and values are {list(keys.shape)} and {list(values.shape)}, not [pages, kv_heads, {PAGE}, {DIM}]"
        )
    return keys.shape[1]


def _group(heads: int, kv_heads: int) -> int:
    """Query heads a kv head."""
    if heads < 1 or heads % kv_heads or heads // kv_heads > 16:
        raise ValueError(f"{heads} query heads over {kv_heads} kv heads: 1 to 16 for each")
    return heads // kv_heads


def _check(dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}; expected contiguous {dtype}")
