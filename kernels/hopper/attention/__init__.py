"""Attention over pages with RoPE and the append of keys and values: how decode.cu and prefill.cu are launched.

bfloat16, head dimension 64 and pages of 64 tokens. Knows shapes and the scratch memory that decode needs; the reasons
for the layouts are in the kernels' files.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.build import TensorMap, load_kernel
from kernels.ops import AttentionParameters, KvPages, Rope, TokenPlaces

FOLDER = Path(__file__).parent
DIM = 64
EVERY_KEY = 2**31 - 1  # a window that hides nothing
MOST_GROUP = 16  # query heads that share a kv head: rows of a multiply

# Decode
WARPS = 4  # of a block; each takes a page at a time
THREADS = 32 * WARPS
BLOCKS = 3  # share a multiprocessor
MOST_TOKENS = 2 * THREADS  # of a launch
MANY_TOKENS = 49  # from so many on, splits are enough for every warp of the machine
MOST_SPLITS = 64  # of a token; longer contexts have larger splits, twice and twice again
MOST_SPLIT_PAGES = 32 * WARPS  # a lane of a warp holds the page table entry of one of the warp's pages

# Prefill
APPEND_THREADS = 128
ROW_THREADS = 4  # append a row of a key or a value
CONSUMERS = 3  # warpgroups of a block that multiply; a fourth brings what they need
PREFILL_THREADS = 128 * (CONSUMERS + 1)
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 160, 32  # of a thread: 128 on average, which is all there are
STAGES = 8  # pages of keys and values on their way to the consumers
QUERY_STAGES = 2  # tiles whose queries are there at once


class Plan(NamedTuple):
    """How a launch of decode divides its work; known from shapes alone."""

    most_splits: int  # of a token
    blocks: int


def decode_defines(group: int, page: int) -> dict[str, int]:
    """The macros of decode.cu for `group` query heads a kv head and pages of `page` tokens."""
    return {
        "GROUP": group,
        "DIM": DIM,
        "PAGE": page,
        "WARPS": WARPS,
        "BLOCKS": BLOCKS,
        "MOST_TOKENS": MOST_TOKENS,
        "MOST_SPLITS": MOST_SPLITS,
        "SHARED_BYTES": decode_shared(page),
    }


def prefill_defines(group: int, page: int) -> dict[str, int]:
    """The macros of prefill.cu for `group` query heads a kv head and pages of `page` tokens."""
    return {
        "GROUP": group,
        "DIM": DIM,
        "PAGE": page,
        "CONSUMERS": CONSUMERS,
        "WARPGROUP_TOKENS": warpgroup_tokens(group),
        "STAGES": STAGES,
        "QUERY_STAGES": QUERY_STAGES,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "APPEND_THREADS": APPEND_THREADS,
        "ROW_THREADS": ROW_THREADS,
        "SHARED_BYTES": prefill_shared(group, page),
    }


def decode_shared(page: int) -> int:
    """Bytes of dynamic shared memory: a page of keys and one of values for each warp."""
    return WARPS * 2 * page * DIM * 2


def prefill_shared(group: int, page: int) -> int:
    """Bytes of dynamic shared memory: the ring of pages, room to align it, and each consumer's queries, in 64 rows of
    bfloat16, and angles."""
    queries, angles = QUERY_STAGES * 64 * DIM * 2, warpgroup_tokens(group) * DIM * 4
    return 1024 + STAGES * 2 * page * DIM * 2 + CONSUMERS * (queries + angles)


def warpgroup_tokens(group: int) -> int:
    """Tokens of a warpgroup of prefill: it holds 64 rows (token, query head), and a lane knows one of 32 tokens."""
    return min(64 // group, 32 // CONSUMERS)


def decode_attention(
    qkv: Tensor, tokens: TokenPlaces, rope: Rope, pages: KvPages, parameters: AttentionParameters
) -> Tensor:
    """One token for each slot, at most 256: qkv [T, (heads + 2 kv_heads) * 64] -> [T, heads * 64].

    A token's bytes depend on nothing but its own row, keys and values. Padding rows may share a slot. Positions and
    slots must not change while a graph runs. Raises ValueError for shapes and types that the kernels do not take. The
    first call on a device for a number of kv heads must be outside a graph's capture: it allocates counters that
    outlive graphs.
    """
    heads, kv_heads = _heads(qkv, tokens, rope, pages, parameters)
    count, width, device = len(qkv), pages.table.shape[1], qkv.device
    if count > MOST_TOKENS:
        raise ValueError(f"{count} tokens: decode takes at most {MOST_TOKENS}")
    page = pages.keys.shape[2]
    plan = plan_of(count, kv_heads, width, page, parameters.window, _multiprocessors(device.index))
    partial = stats = counters = None
    if plan.most_splits > 1:
        partial = torch.empty(count, plan.most_splits, heads, DIM, dtype=torch.float32, device=device)
        stats = torch.empty(count, plan.most_splits, heads, 2, dtype=torch.float32, device=device)
        counters = _counters(device.index, kv_heads)
    out = qkv.new_empty(count, heads * DIM)
    window = parameters.window or EVERY_KEY
    args = (
        *(qkv, *rope, *tokens, pages.table, pages.keys, pages.values, parameters.sinks, out),
        *(partial, stats, counters, count, kv_heads, width, window, plan.most_splits),
    )
    defines = decode_defines(heads // kv_heads, page)
    name = "decode_attention_many" if count >= MANY_TOKENS else "decode_attention"
    kernel = load_kernel(FOLDER / "decode.cu", name, defines, decode_shared(page))
    kernel.launch(grid=(plan.blocks, 1, 1), block=THREADS, args=args)
    return out


def prefill_attention(
    qkv: Tensor, tokens: TokenPlaces, rope: Rope, pages: KvPages, parameters: AttentionParameters
) -> Tensor:
    """Packed prompts: qkv [T, (heads + 2 kv_heads) * 64] -> [T, heads * 64].

    Tokens of a slot stand together. A token's bytes depend on nothing but its own row, keys and values. Positions and
    slots must not change while a graph runs. Raises ValueError for shapes and types that the kernels do not take.
    """
    heads, kv_heads = _heads(qkv, tokens, rope, pages, parameters)
    count, width, page, group = len(qkv), pages.table.shape[1], pages.keys.shape[2], heads // kv_heads
    defines = prefill_defines(group, page)
    inputs = (qkv, *rope, *tokens, pages.table)
    taken = torch.empty(1, dtype=torch.int32, device=qkv.device)  # tiles; `append` sets it to zero
    append = load_kernel(FOLDER / "prefill.cu", "rope_append", defines)
    blocks = -(-count * 2 * kv_heads * ROW_THREADS // APPEND_THREADS)
    append.launch(
        grid=(blocks, 1, 1),
        block=APPEND_THREADS,
        args=(*inputs, pages.keys, pages.values, taken, count, kv_heads, width),
    )
    out = qkv.new_empty(count, heads * DIM)
    kernel = load_kernel(FOLDER / "prefill.cu", "prefill_attention", defines, prefill_shared(group, page))
    tiles = -(-count // (CONSUMERS * warpgroup_tokens(group))) * kv_heads
    key_boxes, value_boxes = (TensorMap(pool.view(-1, DIM), (page, DIM)) for pool in (pages.keys, pages.values))
    kernel.launch(
        grid=(min(tiles, _multiprocessors(qkv.device.index)), 1, 1),
        block=PREFILL_THREADS,
        args=(
            *(*inputs, pages.values, key_boxes, value_boxes, parameters.sinks),
            *(out, taken, count, kv_heads, width, parameters.window or EVERY_KEY),
        ),
    )
    return out


def plan_of(tokens: int, kv_heads: int, width: int, page: int, window: int | None, multiprocessors: int) -> Plan:
    """The plan for `tokens` tokens and page table rows of `width` entries, each a page of `page` tokens.

    Scratch memory holds tokens * most_splits of 66 floats a query head: at 64 heads, a width of 2048 and 256 tokens
    277 MB, the most there is. Raises ValueError for more pages than splits can hold.
    """
    pages = width if window is None else min(width, (window + page - 2) // page + 1)  # a window ends anywhere in a page
    if pages > MOST_SPLITS * MOST_SPLIT_PAGES:
        raise ValueError(f"{pages} pages a token: at most {MOST_SPLITS * MOST_SPLIT_PAGES}")
    most_splits = min(-(-pages // WARPS), MOST_SPLITS)  # the smallest split has a page for each warp
    return Plan(most_splits, min(tokens * kv_heads * most_splits, BLOCKS * multiprocessors))


def _heads(
    qkv: Tensor, tokens: TokenPlaces, rope: Rope, pages: KvPages, parameters: AttentionParameters
) -> tuple[int, int]:
    """Query and kv heads, or ValueError."""
    _check(torch.bfloat16, qkv=qkv, keys=pages.keys, values=pages.values)
    _check(torch.float32, cos=rope.cos, sin=rope.sin, sinks=parameters.sinks)
    _check(torch.int32, positions=tokens.positions, slots=tokens.slots, table=pages.table)
    if pages.keys.shape != pages.values.shape or pages.keys.shape[2:] != (64, DIM):
        raise ValueError(
            f"keys and values are {list(pages.keys.shape)} and {list(pages.values.shape)}, not [pages, kv_heads, 64, "
            f"{DIM}]"
        )
    if rope.cos.shape != rope.sin.shape or rope.cos.shape[1] != DIM // 2:
        raise ValueError(
            f"cos and sin are {list(rope.cos.shape)} and {list(rope.sin.shape)}, not [positions, {DIM // 2}]"
        )
    if qkv.shape[1] % DIM:
        raise ValueError(f"qkv has {qkv.shape[1]} columns, not a multiple of {DIM}")
    kv_heads = pages.keys.shape[1]
    heads = qkv.shape[1] // DIM - 2 * kv_heads
    if heads < 1 or heads % kv_heads or heads // kv_heads > MOST_GROUP:
        raise ValueError(f"{heads} query heads over {kv_heads} kv heads: 1 to {MOST_GROUP} for each")
    if parameters.window is not None and parameters.window < 1:
        raise ValueError(f"window {parameters.window}: a token sees at least itself")
    return heads, kv_heads


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _counters(device: int, kv_heads: int) -> Tensor:
    """Finished splits by (token, kv head): zero between launches, since the last split to finish resets them."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("decode_attention: the first call on a device must be outside a graph's capture")
    return torch.zeros(MOST_TOKENS, kv_heads, dtype=torch.int32, device=torch.device("cuda", device))


def _check(dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}; expected contiguous {dtype}")
