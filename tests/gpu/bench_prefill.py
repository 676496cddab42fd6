"""Microseconds of the products of a prefill step on the H100: `python -m tests.gpu.bench_prefill`.

Medians of graph replays. Operations are those of the live tokens: what a tile pads counts as time lost. Experts by
both kernels; a star marks the one that a step takes.
"""

from functools import partial
from unittest.mock import patch

import torch
from torch.nn import functional as F

from kernels.hopper import experts
from kernels.hopper.experts import STREAM_PAIRS, prefill_experts
from kernels.hopper.linear import pack
from kernels.hopper.linear.prefill import prefill_linear
from kernels.ops import Routing
from tests.gpu.bench_experts import EXPERTS, HIDDEN, INNER, LIMIT, TOP_K, random_matrix
from tests.gpu.timing import microseconds

TOKENS = (64, 128, 256, 512, 1024, 2048, 8192)
PROJECTIONS = {"qkv": (5120, 2880), "o": (2880, 4096)}


def report(name: str, tokens: int, time: float, operations: float) -> None:
    print(f"{name:<14} {tokens:>6} tokens {time:>9.1f} us {operations / time / 1e6:>7.0f} TFLOP/s", flush=True)


def bench() -> None:
    for name, (rows, columns) in PROJECTIONS.items():
        weight = torch.randn(rows, columns, device="cuda").bfloat16()
        bias = torch.randn(rows, device="cuda").bfloat16()
        packed = pack(weight, bias)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, device="cuda").bfloat16()
            size = 2.0 * tokens * rows * columns
            report(name, tokens, microseconds([partial(prefill_linear, x, packed)] * 8), size)
            report(f"{name} cuBLAS", tokens, microseconds([partial(F.linear, x, weight, bias)] * 8), size)
    gate_up, down = random_matrix(2 * INNER, HIDDEN, True), random_matrix(HIDDEN, INNER, False)
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        ids = torch.rand(tokens, EXPERTS, device="cuda").argsort(-1)[:, :TOP_K].contiguous()
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        stream = tokens * TOP_K <= STREAM_PAIRS * EXPERTS
        for name, most, chosen in (("stream", 10**6, stream), ("prefill", 0, not stream)):
            with patch.object(experts, "STREAM_PAIRS", most):
                time = microseconds([partial(prefill_experts, x, Routing(ids, weights), gate_up, down, LIMIT)] * 4)
            report(f"experts {name}{' *' if chosen else ''}", tokens, time, 6.0 * tokens * TOP_K * HIDDEN * INNER)


if __name__ == "__main__":
    with torch.inference_mode():
        bench()
