"""Attention over pages with RoPE and the append of keys and values: how attention.cu and prefill_attention.cu launch.

`kernels.reference.rope_append` followed by `kernels.reference.attention`, for bfloat16, head dimension 64 and pages of
64 tokens. Knows shapes and the scratch memory that decode needs; the reasons for the layouts are in the kernels' files.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import Kernel, compile_module

DIM = 64
PAGE = 64
PAGE_BYTES = PAGE * DIM * 2  # of one kv head
EVERY_KEY = 2**31 - 1  # a window that hides nothing

THREADS = 128  # of a block of decode
SPLIT_PAGES = 4  # in the smallest split
MOST_SPLITS = 64  # of a token; longer contexts have larger splits, twice and twice again
MOST_SPLIT_PAGES = 128
MOST_DECODE_TOKENS = 256
BLOCKS = 3  # share a multiprocessor
SHARED_BYTES = 4 * 2 * PAGE_BYTES  # a page of keys and one of values for each of four warps

APPEND_THREADS = 128
CONSUMERS = 3  # warpgroups of a block of prefill
PREFILL_THREADS = 128 * CONSUMERS + 32
STAGES = 8  # pages of keys and values on their way to the consumers
PREFILL_SHARED_BYTES = STAGES * 2 * PAGE_BYTES + 2 * STAGES * 8 + 1024  # the ring, its barriers, its alignment


class Plan(NamedTuple):
    """How a launch of decode divides its work; known from shapes alone."""

    most: int  # splits of a token
    blocks: int


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    window: int | None,
) -> Tensor:
    """One token for each slot, at most 256: qkv [T, (heads + 2 kv_heads) * 64] -> [T, heads * 64].

    A token's bytes depend on nothing but its own row, keys and values. Rows past the real ones may share a spare slot.
    Positions and slots must not change while a graph runs. Raises ValueError for other shapes and types than Hopper's.
    The first call on a device for a number of kv heads must be outside a graph's capture: it allocates counters that
    outlive graphs.
    """
    heads, kv_heads = _heads(qkv, cos, sin, positions, slots, page_table, keys, values, sinks, window)
    tokens, width, device = len(qkv), page_table.shape[1], qkv.device
    if tokens > MOST_DECODE_TOKENS:
        raise ValueError(f"{tokens} tokens: decode takes at most {MOST_DECODE_TOKENS}")
    plan = plan_of(tokens, kv_heads, width, window, _multiprocessors(device.index))
    partial = peaks = counters = None
    if plan.most > 1:
        partial = torch.empty(tokens, plan.most, heads, DIM, dtype=torch.float32, device=device)
        peaks = torch.empty(tokens, plan.most, heads, 2, dtype=torch.float32, device=device)
        counters = _counters(device.index, kv_heads)
    out = qkv.new_empty(tokens, heads * DIM)
    args = (
        qkv,
        cos,
        sin,
        positions,
        slots,
        page_table,
        keys,
        values,
        sinks,
        out,
        partial,
        peaks,
        counters,
        tokens,
        kv_heads,
        width,
        window or EVERY_KEY,
        plan.most,
    )
    kernel = _kernel("attention", "decode_attention", heads // kv_heads, SHARED_BYTES)
    kernel.launch(grid=(plan.blocks, 1, 1), block=THREADS, args=args)
    return out


def prefill_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    window: int | None,
) -> Tensor:
    """Packed prompts: qkv [T, (heads + 2 kv_heads) * 64] -> [T, heads * 64].

    Tokens of a slot stand together. A token's bytes depend on nothing but its own row, keys and values. Positions and
    slots must not change while a graph runs. Raises ValueError for other shapes and types than Hopper's.
    """
    heads, kv_heads = _heads(qkv, cos, sin, positions, slots, page_table, keys, values, sinks, window)
    tokens, width, group = len(qkv), page_table.shape[1], heads // kv_heads
    blocks = -(-tokens * 2 * kv_heads * 4 // APPEND_THREADS)  # four threads a row of 64
    args = (qkv, cos, sin, positions, slots, page_table, keys, values, tokens, kv_heads, width)
    append = _kernel("prefill_attention", "rope_append", group)
    append.launch(grid=(blocks, 1, 1), block=APPEND_THREADS, args=args)
    out = qkv.new_empty(tokens, heads * DIM)
    args = (
        qkv,
        cos,
        sin,
        positions,
        slots,
        page_table,
        keys,
        values,
        sinks,
        out,
        tokens,
        kv_heads,
        width,
        window or EVERY_KEY,
    )
    tiles = -(-tokens // tile_of(group))
    kernel = _kernel("prefill_attention", "prefill_attention", group, PREFILL_SHARED_BYTES)
    kernel.launch(grid=(tiles * kv_heads, 1, 1), block=PREFILL_THREADS, args=args)
    return out


def plan_of(tokens: int, kv_heads: int, width: int, window: int | None, multiprocessors: int) -> Plan:
    """The plan for `tokens` tokens and page table rows of `width` entries.

    Scratch memory holds tokens * most splits of 66 floats a query head: at 64 heads, a width of 2048 and 256 tokens
    277 MB, the most there is.
    """
    pages = width if window is None else min(width, (window + PAGE - 2) // PAGE + 1)  # a window ends anywhere in a page
    if pages > MOST_SPLITS * MOST_SPLIT_PAGES:
        raise ValueError(f"{pages} pages a token: at most {MOST_SPLITS * MOST_SPLIT_PAGES}")
    most = min(-(-pages // SPLIT_PAGES), MOST_SPLITS)
    return Plan(most, min(tokens * kv_heads * most, BLOCKS * multiprocessors))


def tile_of(group: int) -> int:
    """Tokens of a block of prefill: a consumer holds 64 rows (token, query head), and a lane knows one of 32 tokens."""
    return CONSUMERS * min(64 // group, 32 // CONSUMERS)


def _heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    window: int | None,
) -> tuple[int, int]:
    """Query and kv heads, or ValueError."""
    _check(torch.bfloat16, qkv=qkv, keys=keys, values=values)
    _check(torch.float32, cos=cos, sin=sin, sinks=sinks)
    _check(torch.int32, positions=positions, slots=slots, page_table=page_table)
    if keys.shape != values.shape or keys.shape[2:] != (PAGE, DIM):
        raise ValueError(
            f"keys and values are {list(keys.shape)} and {list(values.shape)}, not [pages, kv_heads, {PAGE}, {DIM}]"
        )
    if cos.shape != sin.shape or cos.shape[1] != DIM // 2:
        raise ValueError(f"cos and sin are {list(cos.shape)} and {list(sin.shape)}, not [positions, {DIM // 2}]")
    if qkv.shape[1] % DIM:
        raise ValueError(f"qkv has {qkv.shape[1]} columns, not a multiple of {DIM}")
    kv_heads = keys.shape[1]
    heads = qkv.shape[1] // DIM - 2 * kv_heads
    if heads < 1 or heads % kv_heads or heads // kv_heads > 16:
        raise ValueError(f"{heads} query heads over {kv_heads} kv heads: 1 to 16 for each")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a token sees at least itself")
    return heads, kv_heads


def _kernel(file: str, name: str, group: int, shared_bytes: int = 0) -> Kernel:
    source = Path(__file__).with_name(f"{file}.cu")
    return compile_module(source, {"GROUP": group}).kernel(name, shared_bytes)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _counters(device: int, kv_heads: int) -> Tensor:
    """Finished splits by (token, kv head): zero between launches, since the last split to finish takes them back."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("decode_attention: the first call on a device must be outside a graph's capture")
    return torch.zeros(MOST_DECODE_TOKENS, kv_heads, dtype=torch.int32, device=torch.device("cuda", device))


def _check(dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}; expected contiguous {dtype}")
