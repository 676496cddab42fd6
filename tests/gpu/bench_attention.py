"""RoPE + append and attention over pages on an H100: `python -m tests.gpu.bench_attention`.

Medians of CUDA-graph replays. A graph makes many calls, each over pages of its own, so that a replay reads several
times the L2: 400 MB where 400 calls are enough for it.
"""

import torch

from kernels.hopper.attention import attention, rope_append
from tests.gpu.timing import BANDWIDTH, microseconds

PAGE, DIM = 64, 64
BYTES_A_REPLAY = 400e6
MOST_CALLS = 400
HEADS, KV_HEADS = 64, 8
CASES = (  # tokens, context, window
    *((tokens, 1024, window) for window in (None, 128) for tokens in (1, 2, 4, 8, 16, 32, 64)),
    (1, 8192, None), (8, 8192, None), (1, 65536, None), (64, 4096, None), (1, 131072, None),
)


def attention_time(positions, window, heads=HEADS, kv_heads=KV_HEADS, width=2048) -> tuple[float, int]:
    """Microseconds and bytes of keys and values."""
    seen = [position + 1 if window is None else min(position + 1, window) for position in positions]
    size = sum(seen) * kv_heads * DIM * 2 * 2
    calls = int(min(MOST_CALLS, max(4, BYTES_A_REPLAY / size)))
    used = [position // PAGE + 1 for position in positions]
    pools = torch.empty(2, calls * sum(used) + 1, kv_heads, PAGE, DIM, device="cuda", dtype=torch.bfloat16).normal_()
    pages = (torch.randperm(pools.shape[1] - 1, device="cuda") + 1).int()
    table = torch.zeros(calls * len(positions), width, device="cuda", dtype=torch.int32)
    for row, own in enumerate(pages.split(used * calls)):
        table[row, : len(own)] = own
    slots = torch.arange(len(table), device="cuda", dtype=torch.int32).split(len(positions))
    at = torch.tensor(positions, device="cuda", dtype=torch.int32)
    q = torch.randn(len(positions), heads, DIM, device="cuda").bfloat16()
    sinks = torch.randn(heads, device="cuda")
    run = [lambda own=own: attention(q, *pools, table, own, at, sinks, window) for own in slots]
    return microseconds(run), size


def rope_time(tokens, heads=HEADS, kv_heads=KV_HEADS) -> float:
    rows = torch.randn(24, tokens, (heads + 2 * kv_heads) * DIM, device="cuda").bfloat16()
    pools = torch.empty(24, 2, tokens + 1, kv_heads, PAGE, DIM, device="cuda", dtype=torch.bfloat16)
    cos, sin = torch.randn(2, 2048, DIM // 2, device="cuda")
    slots = torch.arange(tokens, device="cuda", dtype=torch.int32)
    table = (slots + 1).view(-1, 1).repeat(1, 32)
    at = torch.full_like(slots, 1023)
    return microseconds([
        lambda qkv=qkv, pool=pool: rope_append(qkv, cos, sin, at, slots, table, *pool)
        for qkv, pool in zip(rows, pools, strict=True)
    ])


def prefill_time(tokens, window) -> float:
    """One request's prompt."""
    entries = -(-tokens // PAGE)
    pools = torch.randn(2, entries + 1, KV_HEADS, PAGE, DIM, device="cuda").bfloat16()
    table = torch.arange(1, entries + 1, device="cuda", dtype=torch.int32).view(1, -1)
    at = torch.arange(tokens, device="cuda", dtype=torch.int32)
    q, sinks = torch.randn(tokens, HEADS, DIM, device="cuda").bfloat16(), torch.randn(HEADS, device="cuda")
    slots = torch.zeros_like(at)
    return microseconds([lambda: attention(q, *pools, table, slots, at, sinks, window)] * 4)


def report(name, time, size) -> None:
    rate = size / time * 1e6
    print(f"{name:<44} {time:>8.2f} us {rate / 1e9:>6.0f} GB/s {rate / BANDWIDTH:>6.1%}", flush=True)


def bench() -> None:
    for tokens in (1, 8, 64, 256):
        report(f"rope + append, {tokens} tokens", rope_time(tokens), 4 * tokens * (HEADS + 2 * KV_HEADS) * DIM)
    for tokens, context, window in CASES:
        time, size = attention_time([context - 1] * tokens, window)
        report(f"attention, {tokens} tokens at {context}, window {window}", time, size)
    for heads, kv_heads in ((32, 4), (8, 1)):
        for tokens, context in ((1, 1024), (64, 1024), (1, 65536)):
            time, size = attention_time([context - 1] * tokens, None, heads, kv_heads)
            report(f"attention, {tokens} tokens at {context}, {heads}/{kv_heads} heads", time, size)
    for tokens, window in ((2048, None), (2048, 128), (8192, None)):
        print(f"{f'attention, a prompt of {tokens}, window {window}':<44} {prefill_time(tokens, window):>8.1f} us")
    time, size = attention_time([65535] + [1023] * 63, None)
    report("attention, one token at 65536, 63 at 1024", time, size)


if __name__ == "__main__":
    with torch.inference_mode():
        bench()
