"""Host cost of a step without the model: schedule, choose, fill, collect, encode. `make bench-host`."""

import statistics
import time

import msgspec
import torch

from engine.core import Core
from engine.messages import Submit
from engine.pages import PagePool
from engine.scheduler import Scheduler
from graphs.buckets import Buckets
from graphs.buffers import Buffers
from graphs.plan import SamplingParams

STEPS = 2000


class NoSteps:
    """Launches nothing."""

    def launch(self, bucket, staging):
        return lambda: None


def measure(rows: int, logprobs: int | None) -> list[float]:
    """Microseconds of each steady-state decode step."""
    buckets = Buckets.of([1, 2, 4, 8, 16, 32, 64], [128, 512, 2048], 16)
    pages = rows * (STEPS // 64 + 3) + 2
    buffers = Buffers(
        buckets=buckets,
        layers=1,
        kv_heads=1,
        head_dim=8,
        vocab=1024,
        max_context=32768,
        pages=pages,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    encode = msgspec.msgpack.Encoder().encode
    scheduler = Scheduler(PagePool(pages), buckets, 32768)
    core = Core(scheduler, buffers, NoSteps(), lambda *_: None, encode)
    for id in range(rows):
        core.handle(
            Submit(
                id,
                [id, 1, 2],
                SamplingParams(
                    max_tokens=STEPS + 100, seed=id, logprobs=logprobs, stop_token_ids=(200002, 199999, 200012)
                ),
            )
        )
    for _ in range(20):
        core.turn()
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        core.turn()
        times.append(1e6 * (time.perf_counter() - begin))
    assert scheduler.running == rows
    return times


if __name__ == "__main__":
    print(f"{'rows':>5} {'logprobs':>9} {'median us':>10} {'p99 us':>8}")
    for rows, logprobs in ((1, None), (8, None), (64, None), (64, 20)):
        times = measure(rows, logprobs)
        p99 = statistics.quantiles(times, n=100)[98]
        print(f"{rows:>5} {logprobs or '-':>9} {statistics.median(times):>10.1f} {p99:>8.1f}")
