"""Figures from the records of a load: of each repeat, then the mean over the repeats with its confidence interval.

Pure functions. Latencies are in milliseconds; percentiles are numpy's, linearly interpolated.
"""

import math
from collections.abc import Iterable

import numpy as np
from scipy import stats

from sweep.load import Record, Run
from sweep.settings import Limits

Figures = dict[str, float]


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


def figures(run: Run, limits: Limits, gpus: int) -> Figures:
    """One repeat's figures; nan where there are no values to compute one from."""
    succeeded = [record for record in run.records if not record.error]
    span = max(run.end - run.begin, 1e-9)
    inside = sum(
        tokens
        for record in run.records
        for at, tokens in zip(record.arrivals, record.tokens, strict=True)
        if at <= run.end
    )
    ended = [record for record in succeeded if record.arrivals[-1] <= run.end]
    per_token = np.array([tpot(record) for record in succeeded])
    values: Figures = {"requests": len(run.records), "errors": len(run.records) - len(succeeded)}
    values |= _percentiles("ttft", [ttft(record) for record in succeeded], (50, 90, 99))
    values |= _percentiles("tpot", per_token[~np.isnan(per_token)], (50, 99))
    values |= _percentiles("itl", np.concatenate([[], *map(itl, succeeded)]), (50, 99))
    values |= _percentiles("e2e", [e2e(record) for record in succeeded], (50, 90, 99))
    values["tokens_per_s"] = inside / span
    values["tokens_per_s_per_gpu"] = inside / span / gpus
    values["tokens_per_s_per_user"] = 1e3 / values["tpot_mean_ms"] if values["tpot_mean_ms"] else math.nan
    values["requests_per_s"] = len(ended) / span
    values["goodput_per_s"] = sum(meets(record, limits) for record in ended) / span
    return values


def _percentiles(name: str, latencies: Iterable[float], percentiles: tuple[int, ...]) -> Figures:
    values = np.asarray(list(latencies), dtype=float)
    if not len(values):
        return {f"{name}_{statistic}_ms": math.nan for statistic in ("mean", *(f"p{p}" for p in percentiles))}
    pairs = zip(percentiles, np.percentile(values, percentiles), strict=True)
    return {f"{name}_mean_ms": float(values.mean())} | {f"{name}_p{p}_ms": float(value) for p, value in pairs}


def over_repeats(repeats: list[Figures]) -> tuple[Figures, Figures]:
    """Means over the repeats, and the half-widths of their 95 % confidence intervals by Student's t.

    Requests and errors are added up instead. A half-width is nan where fewer than two repeats have the figure.
    """
    means: Figures = {}
    intervals: Figures = {}
    for name in repeats[0]:
        values = np.array([repeat[name] for repeat in repeats])
        if name in ("requests", "errors"):
            means[name] = int(values.sum())
            continue
        values = values[~np.isnan(values)]
        n = len(values)
        means[name] = float(values.mean()) if n else math.nan
        intervals[name] = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return means, intervals


def objective(means: Figures, name: str, limits: Limits) -> float:
    """What a sweeper minimises: infinite where a limit is broken or the figure is nan.

    `name`: a figure, after a minus where higher is better. Raises KeyError for a name that is not among the figures.
    """
    sign, name = (-1, name[1:]) if name.startswith("-") else (1, name)
    return math.inf if broken(means, limits) or math.isnan(means[name]) else sign * means[name]


def broken(means: Figures, limits: Limits) -> list[str]:
    """A sentence for each limit that a load breaks."""
    broken_limits = []
    for name in ("ttft", "tpot", "e2e"):
        limit, value = getattr(limits, f"{name}_ms"), means[f"{name}_p99_ms"]
        if limit is not None and not value <= limit:
            broken_limits.append(f"p99 {name.upper()} {value:.4g} ms > {limit:g} ms")
    share = means["errors"] / max(means["requests"], 1)
    if share > limits.error_share:
        broken_limits.append(f"errors {share:.1%} > {limits.error_share:.1%}")
    return broken_limits
