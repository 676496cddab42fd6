"""Figures from the records of a load: the repeats pooled, with 95 % confidence intervals, and what that says of limits.

Pure functions. Latencies are in milliseconds; percentiles are numpy's, linearly interpolated.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from sweep.load import Record, Run
from sweep.settings import Limits

Figures = dict[str, float]
Intervals = dict[str, tuple[float, float]]  # nan: unknown; an infinite upper end: too few requests to bound it

# Share of the offered rate that is not served, from which on a load is overloaded. A few dozen requests of uneven
# lengths reach half of it by chance.
SHORT = 0.1
GROWTH = 0.05  # seconds a second: growth of the time to the first token from which on a load is overloaded
DRAWS = 200  # of the bootstrap; Efron and Tibshirani (1993, section 6.4) find 50 to 200 enough for a standard error


def ttft(record: Record) -> float:
    """Time to the first token, from when the request was due."""
    return 1e3 * (record.arrivals[0] - record.intended)


def e2e(record: Record) -> float:
    """End-to-end latency: from when the request was due to its last token."""
    return 1e3 * (record.arrivals[-1] - record.intended)


def tpot(record: Record) -> float:
    """Time per output token after the first arrival; nan if all tokens arrived at once."""
    after = sum(record.tokens[1:])
    return 1e3 * (record.arrivals[-1] - record.arrivals[0]) / after if after else math.nan


def itl(record: Record) -> np.ndarray:
    """Inter-token latencies of the tokens after the first arrival.

    Tokens that arrive together share the time since the arrival before, as in the server's own histogram.
    """
    return np.repeat(1e3 * np.diff(record.arrivals) / record.tokens[1:], record.tokens[1:])


def meets(record: Record, limits: Limits) -> bool:
    """Whether a request counts as goodput: it succeeded within all limits."""
    if record.error:
        return False
    latencies = ((ttft(record), limits.ttft_ms), (tpot(record), limits.tpot_ms), (e2e(record), limits.e2e_ms))
    return not any(limit is not None and value > limit for value, limit in latencies)


def figures(runs: list[Run], limits: Limits, gpus: int) -> tuple[Figures, Intervals]:
    """The figures of a load's repeats and their intervals.

    Latencies of all repeats are pooled; `n` requests have them. The first request of each user of a closed loop is not
    among them: all users start, which is a burst. `first_ttft_mean_ms` tells that apart. Rates are means over the
    repeats. A figure is nan where there are no values to compute one from, and a percentile also where less than one
    value is expected beyond it: a p99 of fewer than 100 is no more than the maximum.
    """
    records = [record for run in runs for record in run.records]
    succeeded = [[record for record in run.records if not (record.error or record.first)] for run in runs]
    firsts = [ttft(record) for record in records if record.first and not record.error]
    values: Figures = {
        "requests": len(records),
        "errors": sum(record.error is not None for record in records),
        "n": sum(map(len, succeeded)),
        "first_ttft_mean_ms": float(np.mean(firsts)) if firsts else math.nan,
    }
    intervals: Intervals = {}
    for name, percentiles, samples in (
        ("ttft", (50, 90, 99), [np.array([ttft(record) for record in repeat]) for repeat in succeeded]),
        ("tpot", (50, 99), [np.array([tpot(record) for record in repeat]) for repeat in succeeded]),
        ("itl", (50, 99), [np.concatenate([[], *map(itl, repeat)]) for repeat in succeeded]),
        ("e2e", (50, 90, 99), [np.array([e2e(record) for record in repeat]) for repeat in succeeded]),
    ):
        known = [sample[~np.isnan(sample)] for sample in samples]
        latencies, ends = pooled(name, percentiles, [sample for sample in known if len(sample)])
        values |= latencies
        intervals |= ends
    each = [_rates(run, limits, gpus) for run in runs]
    for name in each[0]:
        values[name], intervals[name] = _mean([rates[name] for rates in each])
    return values, intervals


def names() -> list[str]:
    """The names of all figures."""
    return list(figures([Run([], 0.0, 1.0)], Limits(), 1)[0])


def _rates(run: Run, limits: Limits, gpus: int) -> Figures:
    """One repeat's rates, from `run.begin` to `run.end`."""
    succeeded = [record for record in run.records if not record.error]
    span = max(run.end - run.begin, 1e-9)
    inside = sum(
        tokens
        for record in run.records
        for at, tokens in zip(record.arrivals, record.tokens, strict=True)
        if run.begin <= at <= run.end
    )
    ended = [record for record in succeeded if run.begin <= record.arrivals[-1] <= run.end]
    per_token = [each for record in succeeded if not math.isnan(each := tpot(record))]
    return {
        "tokens_per_s": inside / span,
        "tokens_per_s_per_gpu": inside / span / gpus,
        "tokens_per_s_per_user": 1e3 * len(per_token) / total if (total := sum(per_token)) else math.nan,
        "requests_per_s": len(ended) / span,
        "goodput_per_s": sum(meets(record, limits) for record in ended) / span,
    } | _keeping_up(run, succeeded)


def _keeping_up(run: Run, succeeded: list[Record]) -> Figures:
    """Whether an open loop's server keeps up: nan for a closed loop, and with fewer than three answers.

    `offered_per_s` and `served_per_s` are taken over the middle four fifths of the requests, by when they were due and
    by when they ended: there the answers in progress at the first and the last request do not count.
    `ttft_growth`: seconds that the time to the first token grows in a second, the slope of a least-squares line. With a
    server that can serve the share x of what is offered it is 1 - x.
    """
    values = dict.fromkeys(("offered_per_s", "served_per_s", "ttft_growth"), math.nan)
    if not run.opened or len(succeeded) < 3:
        return values
    due = np.array([record.intended for record in succeeded])
    values["offered_per_s"] = _middle_rate([record.intended for record in run.records])
    values["served_per_s"] = _middle_rate([record.arrivals[-1] for record in succeeded])
    values["ttft_growth"] = 1e-3 * float(np.polyfit(due - due[0], [ttft(record) for record in succeeded], 1)[0])
    return values


def _middle_rate(times: list[float]) -> float:
    first, last = np.percentile(times, (10, 90))
    return 0.8 * (len(times) - 1) / max(float(last - first), 1e-9)


def _mean(repeats: list[float]) -> tuple[float, tuple[float, float]]:
    """The mean of the repeats that have the figure, and its interval by Student's t; nan with fewer than two."""
    values = np.array([value for value in repeats if not math.isnan(value)])
    n = len(values)
    if not n:
        return math.nan, (math.nan, math.nan)
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return mean, (mean - half, mean + half)


def pooled(name: str, percentiles: tuple[int, ...], repeats: list[np.ndarray]) -> tuple[Figures, Intervals]:
    """Mean and percentiles of a latency over the values of all repeats, none of which is empty, and their intervals."""
    pool = np.concatenate([[], *repeats])
    names = [f"{name}_{statistic}_ms" for statistic in ("mean", *(f"p{p}" for p in percentiles))]
    if not len(pool):
        return dict.fromkeys(names, math.nan), dict.fromkeys(names, (math.nan, math.nan))

    def statistics(sample: np.ndarray) -> np.ndarray:
        return np.concatenate([[sample.mean()], np.percentile(sample, percentiles)])

    values = dict(zip(names, statistics(pool).tolist(), strict=True))
    halves = dict(zip(names, _by_repeat(repeats, statistics), strict=True))
    intervals = {key: (float(np.maximum(values[key] - half, 0.0)), values[key] + half) for key, half in halves.items()}
    for key, p in zip(names[1:], percentiles, strict=True):
        if name != "itl" and len(repeats) > 1:  # the tokens of a request are not independent: only repeats tell there
            low, high = _by_order(np.sort(pool), p / 100)
            low, high = min(low, intervals[key][0]), max(high, intervals[key][1])
            # That the whole of every repeat lies above the quantile is improbable, for a p99 with two of them already.
            if (1 - p / 100) ** len(repeats) < 0.025:
                low = max(low, float(pool.min()))
            intervals[key] = low, high
        if len(pool) * (100 - p) < 100:
            values[key] = math.nan
    return values, intervals


def _by_repeat(repeats: list[np.ndarray], statistics: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """Half of each statistic's interval, by a bootstrap that draws whole repeats; nan with fewer than two.

    Requests of one repeat share what happened to it, so that the repeats are the sample. With so few of them the
    bootstrap's standard error is too small by the root of (n - 1) / n, and its distribution no normal one: Student's t,
    as for a mean.
    """
    n = len(repeats)
    if n < 2:
        return [math.nan] * len(statistics(repeats[0]))
    draws = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    errors = np.std([statistics(np.concatenate([repeats[i] for i in draw])) for draw in draws], axis=0)
    halves: list[float] = (stats.t.ppf(0.975, n - 1) * errors * math.sqrt(n / (n - 1))).tolist()
    return halves


def _by_order(ordered: np.ndarray, share: float) -> tuple[float, float]:
    """The interval of a quantile between two order statistics, exact for independent values (Conover, 1999, 3.2).

    Zero and infinity where no value is low or high enough: the upper end of a p99 takes 368 requests.
    """
    n = len(ordered)
    low, high = (int(stats.binom.ppf(q, n, share)) for q in (0.025, 0.975))
    return float(ordered[low - 1]) if low else 0.0, float(ordered[high]) if high < n else math.inf


def objective(means: Figures, name: str) -> float:
    """What a sweeper minimises: infinite where the figure is nan.

    `name`: a figure, after a minus where higher is better. Raises KeyError for a name that is not among the figures.
    """
    sign, name = (-1, name[1:]) if name.startswith("-") else (1, name)
    return math.inf if math.isnan(means[name]) else sign * means[name]


def overloaded(values: Figures) -> str | None:
    """A sentence if an open loop offered more than was served, or if its requests waited ever longer."""
    offered, served, growth = (values[name] for name in ("offered_per_s", "served_per_s", "ttft_growth"))
    if served < (1 - SHORT) * offered:
        return f"overloaded: {served:.3g} of {offered:.3g} requests/s were served"
    if growth > GROWTH:
        return f"overloaded: the time to the first token grew by {1e3 * growth:.3g} ms each second"
    return None


def limited(limits: Limits) -> bool:
    """Whether there is a limit of which requests may be too few to tell."""
    return any(limit is not None for limit in (limits.ttft_ms, limits.tpot_ms, limits.e2e_ms))


def judge(values: Figures, intervals: Intervals, limits: Limits) -> tuple[list[str], list[str]]:
    """A sentence for each limit that a load fails, and for each of which its requests cannot tell.

    A p99 fails if its whole interval is above the limit, and passes if all of it is at most the limit.
    """
    fails, undecided = [], []
    for name in ("ttft", "tpot", "e2e"):
        limit, key = getattr(limits, f"{name}_ms"), f"{name}_p99_ms"
        low, high = intervals[key]
        if limit is None or high <= limit:
            continue
        ends = f"{low:.4g} or more" if math.isinf(high) else f"{low:.4g} to {high:.4g}"
        if low > limit:
            fails.append(f"p99 {name.upper()} {ends} ms > {limit:g} ms")
        else:
            known = "of one repeat" if math.isnan(low) else f"{ends} ms"
            undecided.append(f"p99 {name.upper()} {known}, the limit is {limit:g} ms ({values['n']:g} requests)")
    share = values["errors"] / max(values["requests"], 1)
    if share > limits.error_share:
        fails.append(f"errors {share:.1%} > {limits.error_share:.1%}")
    return fails, undecided
