"""Loads on a virtual clock: what is sent when, and what the figures make of it."""

import asyncio
import math
from itertools import pairwise

import numpy as np
import pytest

from conf.schema import BucketsConfig, Config, ConfigError, ModelConfig, Weights
from sweep import load, measure
from sweep.settings import Limits, SweepConfig
from sweep.workload import Request, Workload
from tests.sweep.virtual import run


class Fake:
    """A server that answers `first` seconds after a request came, then with a token each `step` seconds.

    It takes one request at a time if `serial`, and remembers when requests came and how many it had at once.
    """

    def __init__(self, first=0.5, step=0.02, serial=False):
        self.first, self.step = first, step
        self.turn = asyncio.Semaphore(1 if serial else 10**6)
        self.times, self.under_way, self.seen = [], 0, []

    async def send(self, request):
        now = asyncio.get_running_loop().time
        self.times.append(now())
        self.under_way += 1
        self.seen.append(self.under_way)
        try:
            async with self.turn:
                await asyncio.sleep(self.first)
                yield 1
                for _ in range(request.output_tokens - 1):
                    await asyncio.sleep(self.step)
                    yield 1
        finally:
            self.under_way -= 1


def requests(count, tokens=11):
    return [Request([1], tokens, 0)] * count


def closed(fake, count, users, seconds=1e9, stall=60):
    return run(load.closed(fake.send, requests(count), users, seconds, stall, lambda record: None))


def test_every_figure_of_a_closed_loop_is_the_truth():
    figures = measure.figures(closed(Fake(), 12, 4), Limits(), gpus=2)
    for name in ("ttft_mean", "ttft_p50", "ttft_p90", "ttft_p99"):
        assert figures[f"{name}_ms"] == pytest.approx(500)
    for name in ("tpot_mean", "tpot_p50", "tpot_p99", "itl_mean", "itl_p50", "itl_p99"):
        assert figures[f"{name}_ms"] == pytest.approx(20)
    for name in ("e2e_mean", "e2e_p50", "e2e_p99"):
        assert figures[f"{name}_ms"] == pytest.approx(700)
    assert figures["tokens_per_s"] == pytest.approx(4 * 11 / 0.7)
    assert figures["tokens_per_s_per_gpu"] == pytest.approx(2 * 11 / 0.7)
    assert figures["tokens_per_s_per_user"] == pytest.approx(50)
    assert figures["requests_per_s"] == figures["goodput_per_s"] == pytest.approx(4 / 0.7)
    assert (figures["requests"], figures["errors"]) == (12, 0)


def test_a_closed_loop_holds_its_concurrency_and_ends_with_its_budget():
    fake = Fake()
    done = closed(fake, 10**4, 3, seconds=7.0)
    assert max(fake.seen) == 3
    assert fake.seen[3:] == [3] * (len(fake.seen) - 3)
    assert done.begin + 7 <= done.end <= done.begin + 7.7
    assert max(fake.times) < 7


def test_rates_leave_out_the_tail_in_which_users_have_nothing_to_do():
    async def send(request):
        await asyncio.sleep(1.0 if request.seed else 10.0)
        yield 1

    ones = [Request([1], 1, seed) for seed in (0, 1, 1)]
    done = run(load.closed(send, ones, 2, 1e9, 60, lambda record: None))
    assert done.end == pytest.approx(2)
    assert measure.figures(done, Limits(), 1)["tokens_per_s"] == pytest.approx(1)


def test_an_open_loop_sends_on_time_and_counts_from_when_a_request_was_due():
    arrivals = [0.0, 0.1, 0.2, 0.3]
    fake = Fake(first=1.0, step=0.0, serial=True)  # each waits for those before it
    done = run(load.opened(fake.send, requests(4, 1), arrivals, 60, lambda record: None))
    assert fake.times == pytest.approx(arrivals)
    assert [measure.ttft(record) for record in done.records] == pytest.approx([1000, 1900, 2800, 3700])


def test_latencies_of_a_client_that_falls_behind_count_from_when_requests_were_due():
    fake = Fake(first=0.5)

    def busy(record):  # the client computes for two seconds, in which it sends nothing
        asyncio.get_running_loop()._clock.now += 2.0

    done = run(load.opened(fake.send, requests(2, 1), [0.0, 1.0], 60, busy))
    assert fake.times == pytest.approx([0.0, 2.5])
    assert [measure.ttft(record) for record in done.records] == pytest.approx([500, 2000])


def test_an_open_loop_ends_with_its_last_arrival_or_with_a_request_that_brought_nothing():
    async def send(request):
        if request.seed:
            raise load.SendError("HTTP 500: broken")
        yield 1

    two = [Request([1], 1, seed) for seed in (0, 1)]
    done = run(load.opened(send, two, [0.0, 3.0], 60, lambda record: None))
    assert done.end - done.begin == pytest.approx(3)
    assert measure.figures(done, Limits(), 1)["requests_per_s"] == pytest.approx(1 / 3)


def test_only_the_time_without_a_token_counts_as_a_stall():
    done = closed(Fake(first=20, step=20), 1, 1, stall=30)
    assert done.records[0].error is None
    assert sum(done.records[0].tokens) == 11


def test_a_client_that_is_late_does_not_flatter_the_server():
    record = load.Record(intended=1.0, sent=3.0, arrivals=[3.5, 4.5], tokens=[1, 1])
    assert (measure.ttft(record), measure.e2e(record), measure.tpot(record)) == (2500, 3500, 1000)


def test_tokens_that_arrive_together_share_the_time():
    record = load.Record(0.0, 0.0, [1.0, 1.4, 1.5], [3, 4, 1])
    assert measure.tpot(record) == pytest.approx(100)
    assert measure.itl(record) == pytest.approx([100, 100, 100, 100, 100])
    assert math.isnan(measure.tpot(load.Record(0.0, 0.0, [1.0], [8])))


def test_percentiles_of_uneven_requests():
    records = [load.Record(0.0, 0.0, [n / 1000, 2 * n / 1000], [1, 1]) for n in range(1, 101)]
    figures = measure.figures(load.Run(records, 0.0, 1.0), Limits(tpot_ms=50, ttft_ms=80), 1)
    assert figures["ttft_p50_ms"] == pytest.approx(50.5)
    assert figures["ttft_p99_ms"] == pytest.approx(99.01)
    assert figures["e2e_p90_ms"] == pytest.approx(2 * 90.1)
    assert figures["goodput_per_s"] == 50


def test_a_request_that_stalls_fails_or_ends_early_is_an_error_of_its_own():
    async def send(request):
        yield 1
        if request.seed == 0:
            await asyncio.sleep(1000)
        if request.seed == 1:
            raise load.SendError("HTTP 500: broken")
        if request.seed != 2:
            yield 1
        if request.seed == 3:
            yield 1

    five = [Request([1], 2, seed) for seed in range(5)]
    done = run(load.closed(send, five, 1, 1e9, 30, lambda record: None))
    assert [record.error for record in done.records] == [
        "nothing came for 30 s",
        "HTTP 500: broken",
        "1 tokens came, 2 were asked for",
        "3 tokens came, 2 were asked for",
        None,
    ]
    figures = measure.figures(done, Limits(), 1)
    assert (figures["requests"], figures["errors"]) == (5, 4)


def test_intervals_are_students():
    means, widths = measure.over_repeats([{"x": x, "requests": 2} for x in (10.0, 12.0, 14.0)])
    assert means == {"x": 12.0, "requests": 6}
    assert widths["x"] == pytest.approx(4.3027 * 2 / math.sqrt(3), rel=1e-4)
    assert math.isnan(measure.over_repeats([{"x": 1.0}])[1]["x"])


def test_a_repeat_without_a_figure_does_not_spoil_the_others():
    means, widths = measure.over_repeats([{"x": x} for x in (10.0, math.nan, 14.0)])
    assert means == {"x": 12.0}
    assert widths["x"] == pytest.approx(12.7062 * 2.8284 / math.sqrt(2), rel=1e-4)


def test_what_ends_after_the_full_load_counts_in_no_rate():
    records = [load.Record(0.0, 0.0, [1.0, last], [1, 1]) for last in (2.0, 9.0)]
    values = measure.figures(load.Run(records, 0.0, 2.0), Limits(), 1)
    assert (values["tokens_per_s"], values["requests_per_s"], values["goodput_per_s"]) == (1.5, 0.5, 0.5)


def test_a_broken_limit_makes_the_objective_infinite():
    means = {
        "ttft_p99_ms": 100.0,
        "tpot_p99_ms": 20.0,
        "e2e_p99_ms": 700.0,
        "tokens_per_s": 5.0,
        "requests": 100,
        "errors": 1,
    }
    lenient = {"error_share": 0.01}
    assert measure.objective(means, "tpot_p99_ms", Limits(**lenient)) == 20
    assert measure.objective(means, "-tokens_per_s", Limits(**lenient)) == -5
    assert measure.objective(means, "tpot_p99_ms", Limits()) == math.inf
    assert measure.objective(means, "tpot_p99_ms", Limits(ttft_ms=99, **lenient)) == math.inf
    assert measure.broken(means, Limits(ttft_ms=99)) == ["p99 TTFT 100 ms > 99 ms", "errors 1.0% > 0.0%"]
    assert measure.objective(means | {"tpot_p99_ms": math.nan}, "tpot_p99_ms", Limits(**lenient)) == math.inf
    assert measure.broken(means | {"e2e_p99_ms": math.nan}, Limits(e2e_ms=1000, **lenient)) == [
        "p99 E2E nan ms > 1000 ms"
    ]


def config(**buckets):
    shape = {"decode_rows": [4], "prefill_tokens": [64], "prefill_sequences": 1, "max_context": 2048}
    return Config(model=ModelConfig("demo", Weights.demo), buckets=BucketsConfig(**shape | buckets))


def test_a_workload_repeats_for_its_seed_and_differs_between_streams():
    work = Workload(SweepConfig(prompt_sigma=0.5, output_sigma=0.5), config())
    assert work.requests(20, 1) == work.requests(20, 1) != work.requests(20, 2)
    assert work.requests(20, 1, 0) != work.requests(20, 1, 1)  # two repeats of one load
    drawn = Workload(SweepConfig(prompt_sigma=0.5, prompt_tokens=100), config()).requests(2000, 0)
    lengths = [len(request.prompt) for request in drawn]
    assert np.median(lengths) == pytest.approx(100, rel=0.1)
    assert np.std(np.log(lengths)) == pytest.approx(0.5, rel=0.1)
    assert {len(request.prompt) for request in Workload(SweepConfig(), config()).requests(9, 0)} == {256}


def test_arrivals_are_a_poisson_process_within_the_budget():
    times = Workload(SweepConfig(seconds=1000), config()).arrivals(5.0, 0)
    gaps = np.array([after - before for before, after in pairwise(times)])
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.05)
    assert times[0] == 0
    assert times[-1] < 1000


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hello"}\n{"prompt": [1, 2], "output_tokens": 3}\n')
    drawn = Workload(SweepConfig(prompts=str(file)), config()).requests(50, 0)
    assert {(str(request.prompt), request.output_tokens) for request in drawn} == {("Hello", 64), ("[1, 2]", 3)}
    file.write_text('{"text": "Hello"}\n')
    with pytest.raises(ConfigError, match=r"sweep\.prompts"):
        Workload(SweepConfig(prompts=str(file)), config())


def test_lengths_that_the_context_cannot_hold_are_refused():
    with pytest.raises(ConfigError, match=r"got 2049, allowed: at most buckets\.max_context = 2048"):
        Workload(SweepConfig(prompt_tokens=2000, output_tokens=49), config())
