"""Figures from what was written down under load: per repeat, then the mean of the repeats and its interval.

Pure functions. Latencies are milliseconds; percentiles are numpy's, interpolated.
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
    return 1e3 * (record.arrivals[-1] - record.intended)


def tpot(record: Record) -> float:
    """Time per output token after the first arrival; nan where all came at once."""
    after = sum(record.tokens[1:])
    return 1e3 * (record.arrivals[-1] - record.arrivals[0]) / after if after else math.nan


def itl(record: Record) -> np.ndarray:
    """Inter-token latencies; tokens that arrive together share the time, as in the server's own histogram."""
    return np.repeat(1e3 * np.diff(record.arrivals) / record.tokens[1:], record.tokens[1:])


def meets(record: Record, limits: Limits) -> bool:
    if record.error:
        return False
    found = ((ttft(record), limits.ttft_ms), (tpot(record), limits.tpot_ms), (e2e(record), limits.e2e_ms))
    return not any(limit is not None and value > limit for value, limit in found)


def figures(run: Run, limits: Limits, gpus: int) -> Figures:
    """One repeat's figures. Those that nothing can be said about are nan."""
    good = [record for record in run.records if not record.error]
    span = max(run.end - run.begin, 1e-9)
    inside = sum(
        tokens
        for record in run.records
        for at, tokens in zip(record.arrivals, record.tokens, strict=True)
        if at <= run.end
    )
    ended = [record for record in good if record.arrivals[-1] <= run.end]
    per_token = np.array([tpot(record) for record in good])
    found = {"requests": len(run.records), "errors": len(run.records) - len(good)}
    found |= _percentiles("ttft", [ttft(record) for record in good], (50, 90, 99))
    found |= _percentiles("tpot", per_token[~np.isnan(per_token)], (50, 99))
    found |= _percentiles("itl", np.concatenate([[], *map(itl, good)]), (50, 99))
    found |= _percentiles("e2e", [e2e(record) for record in good], (50, 90, 99))
    found["tokens_per_s"] = inside / span
    found["tokens_per_s_per_gpu"] = inside / span / gpus
    found["tokens_per_s_per_user"] = 1e3 / found["tpot_mean_ms"] if found["tpot_mean_ms"] else math.nan
    found["requests_per_s"] = len(ended) / span
    found["goodput_per_s"] = sum(meets(record, limits) for record in ended) / span
    return found


def _percentiles(name: str, values: Iterable[float], which: tuple[int, ...]) -> Figures:
    values = np.asarray(list(values), dtype=float)
    if not len(values):
        return {f"{name}_{what}_ms": math.nan for what in ("mean", *(f"p{p}" for p in which))}
    found = zip(which, np.percentile(values, which), strict=True)
    return {f"{name}_mean_ms": float(values.mean())} | {f"{name}_p{p}_ms": float(value) for p, value in found}


def over_repeats(repeats: list[Figures]) -> tuple[Figures, Figures]:
    """(means, half-widths of their 95 % intervals by Student's t; nan for one repeat). Counts are sums."""
    means, intervals = {}, {}
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
    """What a sweeper minimises: infinite where a limit is broken or there is no such figure.

    Raises KeyError for a name that is not among the figures.
    """
    sign, name = (-1, name[1:]) if name.startswith("-") else (1, name)
    return math.inf if broken(means, limits) or math.isnan(means[name]) else sign * means[name]


def broken(means: Figures, limits: Limits) -> list[str]:
    """The limits that a load breaks, in words."""
    said = []
    for name in ("ttft", "tpot", "e2e"):
        limit, value = getattr(limits, f"{name}_ms"), means[f"{name}_p99_ms"]
        if limit is not None and not value <= limit:
            said.append(f"p99 {name.upper()} {value:.4g} ms > {limit:g} ms")
    share = means["errors"] / max(means["requests"], 1)
    if share > limits.error_share:
        said.append(f"errors {share:.1%} > {limits.error_share:.1%}")
    return said
