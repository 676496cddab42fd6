"""The read bandwidth of one GPU's memory: what sets the floor of a decode step."""

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def read(source, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Each program adds up COUNT consecutive blocks of `source`: without a result nothing would be read."""
    base = tl.program_id(0).to(tl.int64) * BLOCK * COUNT
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(COUNT):
        total += tl.load(source + base + step * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total))


def seconds(run: Callable[[], object]) -> float:
    """Seconds of `run` on the current stream, by the device's clock: the median of twelve."""
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times)) / 1e3


def read_bandwidth() -> float:
    """Bytes a second of a streaming read of 4 GiB; the best of three block shapes."""
    source = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    rates = []
    for block, count, warps in ((8192, 16, 8), (16384, 8, 8), (4096, 32, 8)):
        programs = source.numel() // (block * count)
        out = torch.empty(programs, device="cuda")

        def run(programs=programs, out=out, block=block, count=count, warps=warps) -> None:
            read[(programs,)](source, out, count, block, num_warps=warps)

        rates.append(source.nbytes / seconds(run))
    return max(rates)
