"""RoPE, append and attention over pages on an H100: `python -m tests.gpu.bench_attention`.

Medians of CUDA-graph replays. A graph makes many calls, each over pages of its own, so that a replay reads several
times the L2: 400 MB where 400 calls are enough for it.
"""

import torch

from kernels.hopper.attention import decode_attention, prefill_attention
from kernels.ops import AttentionParameters, KvPages, Rope, TokenPlaces
from tests.gpu.timing import BANDWIDTH, microseconds

PAGE, DIM = 64, 64
BYTES_A_REPLAY = 400e6
MOST_CALLS = 400
HEADS, KV_HEADS = 64, 8
CASES = (  # tokens, context, window
    *((tokens, 1024, window) for window in (None, 128) for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    (1, 8192, None),
    (8, 8192, None),
    (1, 65536, None),
    (64, 4096, None),
    (1, 131072, None),
)


def random_rope(positions):
    return Rope(*torch.randn(2, positions, DIM // 2, device="cuda"))


def attention_time(positions, window, heads=HEADS, kv_heads=KV_HEADS, width=2048) -> tuple[float, int]:
    """Decode: microseconds, and bytes of keys and values."""
    seen = [position + 1 if window is None else min(position + 1, window) for position in positions]
    size = sum(seen) * kv_heads * DIM * 2 * 2
    calls = int(min(MOST_CALLS, max(4, BYTES_A_REPLAY / size)))
    used = [position // PAGE + 1 for position in positions]
    pools = torch.empty(2, calls * sum(used) + 1, kv_heads, PAGE, DIM, device="cuda", dtype=torch.bfloat16).normal_()
    entries = (torch.randperm(pools.shape[1] - 1, device="cuda") + 1).int()
    table = torch.zeros(calls * len(positions), width, device="cuda", dtype=torch.int32)
    for row, own in enumerate(entries.split(used * calls)):
        table[row, : len(own)] = own
    slots = torch.arange(len(table), device="cuda", dtype=torch.int32).split(len(positions))
    at = torch.tensor(positions, device="cuda", dtype=torch.int32)
    qkv = torch.randn(len(positions), (heads + 2 * kv_heads) * DIM, device="cuda").bfloat16()
    parameters = AttentionParameters(torch.randn(heads, device="cuda"), window)
    rope, pages = random_rope(max(positions) + 1), KvPages(*pools, table)
    run = [lambda own=own: decode_attention(qkv, TokenPlaces(at, own), rope, pages, parameters) for own in slots]
    return microseconds(run), size


def prefill_time(requests, tokens, window) -> tuple[float, int]:
    """`requests` whole prompts of `tokens` tokens each: microseconds, and flops of both products."""
    entries, count = -(-tokens // PAGE), requests * tokens
    pools = torch.randn(2, requests * entries + 1, KV_HEADS, PAGE, DIM, device="cuda").bfloat16()
    table = torch.arange(1, requests * entries + 1, device="cuda", dtype=torch.int32).view(requests, entries)
    at = torch.arange(tokens, device="cuda", dtype=torch.int32).repeat(requests)
    slots = torch.arange(requests, device="cuda", dtype=torch.int32).repeat_interleave(tokens)
    qkv = torch.randn(count, (HEADS + 2 * KV_HEADS) * DIM, device="cuda").bfloat16()
    parameters, rope = AttentionParameters(torch.randn(HEADS, device="cuda"), window), random_rope(tokens)
    places, pages = TokenPlaces(at, slots), KvPages(*pools, table)
    seen = sum(min(position + 1, window or tokens) for position in range(tokens)) * requests
    run = [lambda: prefill_attention(qkv, places, rope, pages, parameters)] * 4
    return microseconds(run), seen * HEADS * DIM * 2 * 2


def report(name, time, size) -> None:
    rate = size / time * 1e6
    print(f"{name:<44} {time:>8.2f} us {rate / 1e9:>6.0f} GB/s {rate / BANDWIDTH:>6.1%}", flush=True)


def bench() -> None:
    for tokens, context, window in CASES:
        time, size = attention_time([context - 1] * tokens, window)
        report(f"attention, {tokens} tokens at {context}, window {window}", time, size)
    for heads, kv_heads in ((32, 4), (8, 1)):
        for tokens, context in ((1, 1024), (64, 1024), (1, 65536)):
            time, size = attention_time([context - 1] * tokens, None, heads, kv_heads)
            report(f"attention, {tokens} tokens at {context}, {heads}/{kv_heads} heads", time, size)
    time, size = attention_time([65535] + [1023] * 63, None)
    report("attention, one token at 65536, 63 at 1024", time, size)
    for requests, tokens in ((1, 128), (1, 2048), (1, 4096), (1, 8192), (8, 1024)):
        for window in (None, 128):
            time, flops = prefill_time(requests, tokens, window)
            name = f"prefill, {requests} of {tokens}, window {window}"
            print(f"{name:<44} {time:>8.1f} us {flops / time / 1e6:>6.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        bench()
