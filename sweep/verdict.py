"""Which configuration for which latency target: the Pareto front of the rows, as sentences and as files.

Pure functions over rows. Only rows with status "ok" are recommended.
"""

import math
import shlex
from typing import Any

from omegaconf import OmegaConf

from sweep.store import Row

ALIKE = 1.02  # costs within this factor count as equal: of two such rows the one with more throughput is chosen
WORTH = 1.05  # a choice that costs more has at least this factor more throughput


def cost_of(rows: list[Row]) -> str:
    """The figure that is the verdict's latency: p99 TPOT, or the median if a row of status ok has too few requests."""
    known = all(value(row, "tpot_p99_ms") is not None for row in rows if row["status"] == "ok")
    return "tpot_p99_ms" if known else "tpot_p50_ms"


def front(rows: list[Row], cost: str, gain: str = "tokens_per_s_per_gpu") -> list[Row]:
    """The Pareto front: rows that no other row beats in both figures, from the least cost to the greatest gain."""
    candidates = [row for row in rows if row["status"] == "ok" and None not in (value(row, cost), value(row, gain))]
    best: float = -math.inf
    front_rows = []
    for row in sorted(candidates, key=lambda row: (figure(row, cost), -figure(row, gain))):
        if figure(row, gain) > best:
            best = figure(row, gain)
            front_rows.append(row)
    return front_rows


def choices(rows: list[Row]) -> list[Row]:
    """The rows of the front that differ enough to choose between, from the least TPOT to the most throughput."""
    chosen: list[Row] = []
    latency = cost_of(rows)
    least = -math.inf  # the least cost among the last choice and the rows that it replaced
    for row in front(rows, latency):
        cost, gain = figure(row, latency), figure(row, "tokens_per_s_per_gpu")
        if cost <= ALIKE * least:
            chosen[-1] = row
        elif not chosen or gain >= WORTH * figure(chosen[-1], "tokens_per_s_per_gpu"):
            chosen.append(row)
            least = cost
    return chosen


def knee(rows: list[Row]) -> Row | None:
    """The load of one configuration with the greatest throughput divided by delay: Kleinrock's power (1979)."""
    candidates = [row for row in rows if value(row, "e2e_mean_ms")]
    return max(candidates, key=lambda row: figure(row, "tokens_per_s") / figure(row, "e2e_mean_ms"), default=None)


def value(row: Row, name: str) -> float | None:
    """A figure of the row; None if it has none, or nan."""
    number = row.get("figures", {}).get(name)
    return None if number is None or math.isnan(number) else number


def interval(row: Row, name: str) -> tuple[float | None, float | None]:
    """The ends of a figure's 95 % interval; None where one is unknown, or infinite."""
    ends = row["intervals"].get(name, (None, None))
    low, high = (None if end is None or not math.isfinite(end) else float(end) for end in ends)
    return low, high


def figure(row: Row, name: str) -> float:
    """A figure of a row that has it. Raises KeyError."""
    number: float = row["figures"][name]
    return number


def command(row: Row) -> str:
    """The command line that starts the row's server."""
    return shlex.join(["python", "serve.py", *row["overrides"]])


def words(rows: list[Row]) -> list[str]:
    """The verdict: one sentence a choice, or one that says why there is none."""
    chosen = choices(rows)
    if not chosen:
        return [
            "No configuration can be recommended: "
            + (
                "; ".join(sorted({f"{row['configuration']}: {row['reason']}" for row in rows}))
                or "nothing was measured"
            )
        ]
    return [
        f"For {_named(rows)} ≤ {round_up(figure(row, cost_of(rows)))} ms: `{command(row)}` with {row['load']} "
        f"({value(row, 'tokens_per_s_per_user'):.4g} tokens/s a user, {value(row, 'tokens_per_s_per_gpu'):.4g} "
        f"{per_gpu(row)}{_ttft(row)}, {row['figures']['n']:g} requests)."
        for row in chosen
    ]


def _named(rows: list[Row]) -> str:
    return "p99 TPOT" if cost_of(rows) == "tpot_p99_ms" else "a median TPOT"


def _ttft(row: Row) -> str:
    """The greatest percentile of the time to the first token that the row's requests can show."""
    known = ((p, value(row, f"ttft_p{p}_ms")) for p in (99, 90, 50))
    return next((f", p{p} TTFT {round_up(at)} ms" for p, at in known if at is not None), "")


def per_gpu(row: Row) -> str:
    """The unit of `tokens_per_s_per_gpu` after "tokens/s": a CPU counts as one device."""
    return "a GPU" if row["on_gpu"] else "in all"


def round_up(number: float, digits: int = 3) -> str:
    """The number with that many digits, rounded up: a target that was met."""
    scale = 10 ** (digits - 1 - math.floor(math.log10(number))) if number > 0 else 1
    return f"{math.ceil(number * scale - 1e-9) / scale:.6g}"


def buckets_yaml(row: Row) -> str:
    """The row's bucket group as a file for conf/buckets/."""
    keys = {key: item for key, item in row["buckets_config"].items() if item is not None}
    return f"# {about(row)}\n" + OmegaConf.to_yaml(keys)


def kubernetes_values(row: Row) -> str:
    """Container arguments and GPUs for Kubernetes, where the server must listen on all addresses."""
    values: dict[str, Any] = {"args": ["server.host=0.0.0.0", *row["overrides"]]}
    if row["on_gpu"]:
        values["resources"] = {"limits": {"nvidia.com/gpu": row["gpus"]}}
    return f"# {about(row)}\n" + OmegaConf.to_yaml(values)


def about(row: Row) -> str:
    """Where the row's figures come from, for the comment at the top of a file."""
    return (
        f"{row['load']} on {row['device']}: median TPOT {value(row, 'tpot_p50_ms'):.4g} ms, "
        f"{value(row, 'tokens_per_s_per_gpu'):.4g} tokens/s {per_gpu(row)}"
    )
