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
    figures = measure.figures([closed(Fake(), 104, 4)], Limits(), gpus=2)[0]
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
    assert (figures["requests"], figures["errors"], figures["n"]) == (104, 0, 100)


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
    assert measure.figures([done], Limits(), 1)[0]["tokens_per_s"] == pytest.approx(1)


@pytest.mark.parametrize("stagger", [0.0, 0.0275])
def test_the_burst_of_a_start_is_in_no_percentile(stagger):
    """Prompts of 20 ms, one at a time, and answers of 200 ms: a user who meets no other waits for 20 ms."""
    turn = asyncio.Lock()

    async def send(request):
        async with turn:
            await asyncio.sleep(0.02)
        yield 1
        await asyncio.sleep(0.2)
        yield 1

    done = run(load.closed(send, requests(8 * 21, 2), 8, 1e9, 60, lambda record: None, stagger))
    figures = measure.figures([done], Limits(), 1)[0]
    assert (figures["requests"], figures["n"]) == (168, 160)
    assert figures["ttft_p99_ms"] == pytest.approx(20)
    assert figures["first_ttft_mean_ms"] == pytest.approx(20 if stagger else 90)


def test_rates_count_from_when_all_users_are_busy():
    done = run(load.closed(Fake().send, requests(400), 4, 7.0, 60, lambda record: None, stagger=1.0))
    assert done.begin == pytest.approx(3)
    assert done.end == pytest.approx(7, abs=0.7)
    assert measure.figures([done], Limits(), 1)[0]["tokens_per_s"] == pytest.approx(4 * 11 / 0.7, rel=0.1)


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
    assert measure.figures([done], Limits(), 1)[0]["requests_per_s"] == pytest.approx(1 / 3)


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
    figures = measure.figures([load.Run(records, 0.0, 1.0)], Limits(tpot_ms=50, ttft_ms=80), 1)[0]
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
    figures = measure.figures([done], Limits(), 1)[0]
    assert (figures["requests"], figures["errors"]) == (5, 4)


def repeat_of(first_tokens, tokens=2, span=1.0):
    """A repeat whose requests have these times to the first token, in seconds, and 10 ms a token after it."""
    records = [load.Record(0.0, 0.0, [at + 0.01 * i for i in range(tokens)], [1] * tokens) for at in first_tokens]
    return load.Run(records, 0.0, span)


def test_the_intervals_of_rates_are_students():
    done = [repeat_of([0.1] * n, span=2.0) for n in (10, 12, 14)]
    values, intervals = measure.figures(done, Limits(), 1)
    half = 4.3027 * 1 / math.sqrt(3)
    assert values["requests_per_s"] == 6
    assert intervals["requests_per_s"] == pytest.approx((6 - half, 6 + half), rel=1e-4)
    assert (values["requests"], values["n"]) == (36, 36)
    once = measure.figures(done[:1], Limits(), 1)[1]
    assert all(math.isnan(end) for interval in once.values() for end in interval)


def test_a_repeat_without_a_figure_does_not_spoil_the_others():
    values, intervals = measure.figures([repeat_of([0.1] * 9, n) for n in (3, 1, 5)], Limits(), 1)
    assert values["tpot_p50_ms"] == pytest.approx(10)
    assert values["tokens_per_s_per_user"] == pytest.approx(100)
    assert intervals["tokens_per_s_per_user"] == pytest.approx((100, 100))


def test_repeats_are_pooled_and_no_percentile_is_shown_of_too_few_requests():
    late = [repeat_of([1.0] * 33), repeat_of([1.0] * 33), repeat_of([1.0] * 32 + [9.0])]
    values, _ = measure.figures(late, Limits(), 1)
    assert math.isnan(values["ttft_p99_ms"])
    assert values["ttft_p90_ms"] == pytest.approx(1000)
    late[0].records += repeat_of([1.0]).records
    values, _ = measure.figures(late, Limits(), 1)
    assert values["n"] == 100
    assert values["ttft_p99_ms"] == pytest.approx(1080)  # of all hundred; the mean of three maxima would be 3667


@pytest.mark.parametrize("between", [0.0, 0.1], ids=["independent", "repeats differ"])
def test_nineteen_of_twenty_intervals_hold_the_truth(between):
    """Lognormal times to the first token, of which the true percentiles are known."""
    sigma, repeats, each = 0.4, 4, 100
    draw = np.random.default_rng(1)
    held = {50: 0, 99: 0}
    trials = 100
    for _ in range(trials):
        shifts = draw.normal(0, between, repeats)
        done = [np.exp(shift + sigma * draw.standard_normal(each)) for shift in shifts]
        _, intervals = measure.pooled("ttft", (50, 99), done)
        for p, z in ((50, 0.0), (99, 2.3263)):
            low, high = intervals[f"ttft_p{p}_ms"]
            assert math.isfinite(high)
            held[p] += low <= math.exp(z * math.hypot(sigma, between)) <= high
    assert min(held.values()) >= 0.92 * trials


def test_of_too_few_requests_a_p99_has_no_upper_end():
    _, intervals = measure.figures([repeat_of(np.linspace(0.1, 0.2, 100)) for _ in range(3)], Limits(), 1)
    low, high = intervals["ttft_p99_ms"]
    assert low == pytest.approx(197.0, abs=1)
    assert math.isinf(high)


def test_repeats_that_differ_much_leave_no_doubt_of_a_limit_that_all_requests_break():
    _, intervals = measure.figures([repeat_of([1.0] * 50), repeat_of([1.0] * 49 + [40.0])], Limits(), 1)
    assert intervals["ttft_p99_ms"][0] == pytest.approx(1000)
    assert intervals["ttft_mean_ms"][0] == 0  # of a mean two repeats tell nothing


def test_what_ends_after_the_full_load_counts_in_no_rate():
    records = [load.Record(0.0, 0.0, [1.0, last], [1, 1]) for last in (2.0, 9.0)]
    values = measure.figures([load.Run(records, 0.0, 2.0)], Limits(), 1)[0]
    assert (values["tokens_per_s"], values["requests_per_s"], values["goodput_per_s"]) == (1.5, 0.5, 0.5)


def test_the_objective_is_a_figure_and_infinite_if_there_is_none():
    figures = {"tpot_p50_ms": 20.0, "tpot_p99_ms": math.nan, "tokens_per_s": 5.0}
    assert measure.objective(figures, "tpot_p50_ms") == 20
    assert measure.objective(figures, "-tokens_per_s") == -5
    assert measure.objective(figures, "tpot_p99_ms") == math.inf


def judged(first_tokens, ttft_ms):
    limits = Limits(ttft_ms=ttft_ms)
    return measure.judge(*measure.figures([repeat_of(first_tokens)] * 3, limits, 1), limits)


def test_a_limit_passes_fails_or_cannot_be_told():
    many = np.linspace(0.1, 0.2, 200)
    assert judged(many, 201) == ([], [])
    assert judged(many, 190) == (["p99 TTFT 198.5 to 200 ms > 190 ms"], [])
    fails, undecided = judged(many, 199)
    assert not fails
    assert undecided == ["p99 TTFT 198.5 to 200 ms, the limit is 199 ms (600 requests)"]


def test_few_requests_show_no_p99_but_may_show_that_a_limit_is_broken():
    assert judged([0.1] * 8, 500) == ([], ["p99 TTFT 100 or more ms, the limit is 500 ms (24 requests)"])
    assert judged([0.6] * 8, 500) == (["p99 TTFT 600 or more ms > 500 ms"], [])


def test_errors_are_counted_against_their_limit():
    done = [repeat_of([0.1] * 50), repeat_of([0.1] * 50)]
    done[0].records[0].error = "HTTP 500"
    for share, fails in ((0.0, ["errors 1.0% > 0.0%"]), (0.01, [])):
        limits = Limits(error_share=share)
        assert measure.judge(*measure.figures(done, limits, 1), limits) == (fails, [])


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
    assert times[-1] < 1000
    firsts = [Workload(SweepConfig(seconds=1000), config()).arrivals(5.0, repeat)[0] for repeat in range(200)]
    assert np.mean(firsts) == pytest.approx(0.2, rel=0.25)  # nothing is forced at the start


@pytest.mark.parametrize(("load_share", "allowed"), [(0.5, (0, 0)), (0.8, (0, 0)), (1.2, (10, 10)), (2.0, (10, 10))])
def test_an_open_loop_that_is_offered_more_than_is_served_is_overloaded(load_share, allowed):
    """Ten loads of three repeats, at a server of eight places that serves 20 requests/s."""
    flagged = 0
    for seed in range(10):
        work, done = Workload(SweepConfig(seconds=20, seed=seed), config()), []
        for repeat in range(3):
            fake = Fake(first=0.1, step=0.3)
            fake.turn = asyncio.Semaphore(8)
            arrivals = work.arrivals(20 * load_share, repeat)
            few = requests(len(arrivals), 2)
            done.append(run(load.opened(fake.send, few, arrivals, 600, lambda record: None)))
        values = measure.figures(done, Limits(), 1)[0]
        assert values["offered_per_s"] == pytest.approx(20 * load_share, rel=0.2)
        assert values["served_per_s"] <= 20.5
        flagged += measure.overloaded(values) is not None
    assert allowed[0] <= flagged <= allowed[1]


def test_a_few_answers_of_uneven_lengths_are_no_overload():
    draw, flagged = np.random.default_rng(0), 0
    for _ in range(40):
        done = []
        for _ in range(3):
            due = np.cumsum(draw.exponential(0.5, 40))
            lengths = 2 * np.exp(0.5 * draw.standard_normal(40))
            records = [load.Record(at, at, [at + 0.1, at + e2e], [1, 1]) for at, e2e in zip(due, lengths, strict=True)]
            done.append(load.Run(records, 0.0, 20.0, opened=True))
        flagged += measure.overloaded(measure.figures(done, Limits(), 1)[0]) is not None
    assert flagged <= 2


def test_a_closed_loop_is_never_overloaded():
    assert measure.overloaded(measure.figures([closed(Fake(serial=True), 30, 6)], Limits(), 1)[0]) is None


def test_refused_requests_are_not_served():
    async def send(request):
        if request.seed % 2:
            raise load.SendError("HTTP 429: full")
        await asyncio.sleep(0.1)
        yield 1

    arrivals = [0.1 * n for n in range(100)]
    done = run(load.opened(send, [Request([1], 1, n) for n in range(100)], arrivals, 60, lambda record: None))
    values = measure.figures([done], Limits(), 1)[0]
    assert values["offered_per_s"] == pytest.approx(10)
    assert measure.overloaded(values) == "overloaded: 5 of 10 requests/s were served"


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hello"}\n{"prompt": [1, 2], "output_tokens": 3}\n')
    drawn = Workload(SweepConfig(prompts=str(file)), config()).requests(50, 0)
    assert {(str(request.prompt), request.output_tokens) for request in drawn} == {("Hello", 64), ("[1, 2]", 3)}
    file.write_text('{"text": "Hello"}\n')
    with pytest.raises(ConfigError, match=r"sweep\.prompts"):
        Workload(SweepConfig(prompts=str(file)), config())


def test_steps_are_timed_at_the_lengths_of_the_loads(tmp_path):
    assert Workload(SweepConfig(prompt_tokens=100, output_tokens=40), config()).lengths() == (100, 120)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The capital of France", "output_tokens": 10}\n')
    assert Workload(SweepConfig(prompts=str(file)), config()).lengths() == (4, 9)


def test_lengths_that_the_context_cannot_hold_are_refused():
    with pytest.raises(ConfigError, match=r"got 2049, allowed: at most buckets\.max_context = 2048"):
        Workload(SweepConfig(prompt_tokens=2000, output_tokens=49), config())


def test_token_ids_of_a_file_that_the_context_cannot_hold_are_refused(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a text"}}\n{{"prompt": {[1] * 2040}, "output_tokens": 9}}\n')
    with pytest.raises(ConfigError, match=r"sweep\.prompts \+ sweep\.output_tokens: got 2049, allowed: at most"):
        Workload(SweepConfig(prompts=str(file)), config())
