"""How the benches time kernels: medians of CUDA-graph replays, by the device's own clock."""

from collections.abc import Callable
from statistics import median

import torch

BANDWIDTH = 3.08e12  # bytes a second: a streaming read on an H100 SXM, measured; times are compared with it
REPLAYS, WARM_UP = 15, 3


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call, where a graph makes all in order. Together they should read more than the L2 holds."""
    for call in calls[:2]:
        call()  # compiles, allocates what stays, and lets libraries choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(WARM_UP + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    return median(times[WARM_UP:])
