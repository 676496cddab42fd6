"""Microseconds of one layer's experts on the H100: `python -m tests.gpu.bench_experts`.

Medians of graph replays. A graph calls two layers of the 20b (847 MB packed) in turn, each call with its own choice of
experts; for one token no two calls of a graph read the same expert, so that nothing is left in L2. The floor is
the bytes of the experts chosen.
"""

import statistics
from functools import partial

import torch

from kernels.hopper.experts import decode_experts, pack
from kernels.ops import PackedExperts, Routing
from tests.gpu.timing import BANDWIDTH, microseconds

EXPERTS, HIDDEN, INNER, TOP_K, LAYERS, LIMIT = 32, 2880, 2880, 4, 2, 7.0
EXPERT_BYTES = 3 * HIDDEN * INNER * 4.25 / 8
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CALLS = 16


def random_matrix(rows: int, columns: int, interleaved: bool) -> PackedExperts:
    shape, options = (EXPERTS, rows, columns // 32), {"dtype": torch.uint8, "device": "cuda"}
    blocks = torch.randint(0, 256, (*shape, 16), **options)
    scales = torch.randint(117, 123, shape, **options)
    return pack(blocks, scales, torch.randn(shape[:2], device="cuda").bfloat16(), interleaved)


def choices(count: int) -> list[torch.Tensor]:
    """Expert ids [count, TOP_K] for each call: distinct experts within a layer while they last, then random ones."""
    if count * TOP_K * CALLS <= EXPERTS * LAYERS:
        whole = [torch.randperm(EXPERTS, device="cuda") for _ in range(LAYERS)]
        return [
            whole[n % LAYERS].roll(-(n // LAYERS) * count * TOP_K)[: count * TOP_K].view(count, TOP_K)
            for n in range(CALLS)
        ]
    return [torch.rand(count, EXPERTS, device="cuda").argsort(-1)[:, :TOP_K].contiguous() for _ in range(CALLS)]


def measure(layers: list[tuple[PackedExperts, PackedExperts]], count: int) -> tuple[float, float]:
    """Microseconds and bytes of one call."""
    ids = choices(count)
    x = torch.randn(CALLS, count, HIDDEN, device="cuda").bfloat16()
    weights = torch.rand(CALLS, count, TOP_K, device="cuda").softmax(-1)

    calls = [
        partial(decode_experts, x[n], Routing(ids[n], weights[n]), *layers[n % LAYERS], LIMIT) for n in range(CALLS)
    ]
    return microseconds(calls), statistics.mean(len(chosen.unique()) for chosen in ids) * EXPERT_BYTES


def bench() -> None:
    layers = [(random_matrix(2 * INNER, HIDDEN, True), random_matrix(HIDDEN, INNER, False)) for _ in range(LAYERS)]
    print(f"{'tokens':>6} {'us':>8} {'GB/s':>6} {'of floor':>8} {'TFLOP/s':>8}")
    for count in TOKENS:
        time, size = measure(layers, count)
        flops = 2 * 3 * HIDDEN * INNER * TOP_K * count
        rate = size / time * 1e6
        print(f"{count:6} {time:8.1f} {rate / 1e9:6.0f} {rate / BANDWIDTH:8.0%} {flops / time / 1e6:8.1f}")


if __name__ == "__main__":
    bench()
