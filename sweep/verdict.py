"""Which configuration for which latency target: the rows that nothing beats, in words, as YAML and as values.

Pure functions over rows; only a row without fault can win.
"""

import math
import shlex
from typing import Any

from omegaconf import OmegaConf

from sweep.store import Row

ALIKE = 1.02  # costs this near are the same: what gains more there is the better choice
WORTH = 1.05  # a choice that costs more gains at least this


def front(rows: list[Row], cost: str = "tpot_p99_ms", gain: str = "tokens_per_s_per_gpu") -> list[Row]:
    """Rows that no other beats in both, from the least cost to the greatest gain."""
    able = [row for row in rows if row["status"] == "ok" and None not in (value(row, cost), value(row, gain))]
    best, found = -math.inf, []
    for row in sorted(able, key=lambda row: (value(row, cost), -value(row, gain))):
        if value(row, gain) > best:
            best = value(row, gain)
            found.append(row)
    return found


def choices(rows: list[Row]) -> list[Row]:
    """Of the front in p99 TPOT those between which a user would choose, from the least p99 TPOT."""
    found: list[Row] = []
    least = -math.inf  # cost of the last choice and of what it took the place of
    for row in front(rows):
        cost, gain = value(row, "tpot_p99_ms"), value(row, "tokens_per_s_per_gpu")
        if cost <= ALIKE * least:
            found[-1] = row
        elif not found or gain >= WORTH * value(found[-1], "tokens_per_s_per_gpu"):
            found.append(row)
            least = cost
    return found


def knee(rows: list[Row]) -> Row | None:
    """Of one configuration's loads the one with the most throughput by delay: Kleinrock's power (1979)."""
    able = [row for row in rows if value(row, "e2e_mean_ms")]
    return max(able, key=lambda row: value(row, "tokens_per_s") / value(row, "e2e_mean_ms"), default=None)


def value(row: Row, name: str) -> float | None:
    found = row.get("figures", {}).get(name)
    return None if found is None or math.isnan(found) else found


def command(row: Row) -> str:
    return shlex.join(["python", "serve.py", *row["overrides"]])


def words(rows: list[Row]) -> list[str]:
    """The verdict, a sentence each."""
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
        f"For p99 TPOT ≤ {round_up(value(row, 'tpot_p99_ms'))} ms: `{command(row)}` with {row['load']} "
        f"({value(row, 'tokens_per_s_per_user'):.4g} tokens/s a user, {value(row, 'tokens_per_s_per_gpu'):.4g} "
        f"{per_gpu(row)}, p99 TTFT {round_up(value(row, 'ttft_p99_ms'))} ms)."
        for row in chosen
    ]


def per_gpu(row: Row) -> str:
    return "a GPU" if row["on_gpu"] else "in all"


def round_up(number: float, digits: int = 3) -> str:
    """Never below what was measured."""
    scale = 10 ** (digits - 1 - math.floor(math.log10(number))) if number > 0 else 1
    return f"{math.ceil(number * scale - 1e-9) / scale:.6g}"


def buckets_yaml(row: Row) -> str:
    """The row's bucket group as a file for conf/buckets/."""
    given = {key: item for key, item in row["buckets_config"].items() if item is not None}
    return f"# {about(row)}\n" + OmegaConf.to_yaml(given)


def kubernetes_values(row: Row) -> str:
    """Container arguments and GPUs; the server must listen beyond its own host there."""
    made: dict[str, Any] = {"args": ["server.host=0.0.0.0", *row["overrides"]]}
    if row["on_gpu"]:
        made["resources"] = {"limits": {"nvidia.com/gpu": row["gpus"]}}
    return f"# {about(row)}\n" + OmegaConf.to_yaml(made)


def about(row: Row) -> str:
    return (
        f"{row['load']} on {row['device']}: p99 TPOT {value(row, 'tpot_p99_ms'):.4g} ms, "
        f"{value(row, 'tokens_per_s_per_gpu'):.4g} tokens/s {per_gpu(row)}"
    )
