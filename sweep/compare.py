"""What changed between two sweeps by more than noise, row by row; and a refusal of what cannot be compared.

The two were measured at different times: a machine that is faster today looks like a better program.
"""

import json
import math
from pathlib import Path
from typing import Any

from conf.schema import ConfigError
from sweep.store import Row, read_rows
from sweep.verdict import interval

WATCHED = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "tokens_per_s_per_gpu")


def earlier(folder: str) -> list[Row]:
    """The rows of the sweep in `folder`. Raises ConfigError if there is none, or one of an older form."""
    rows = read_rows(Path(folder))
    if not rows:
        raise ConfigError(f"sweep.compare: got {folder!r}, allowed: a folder with the results.jsonl of a sweep")
    if any("figures" in row and "workload" not in row for row in rows):
        raise ConfigError(f"sweep.compare: {folder} is of a version that did not note the workload: measure it again")
    return rows


def require_alike(old: list[Row], row: Row, folder: str) -> None:
    """Refuse a row whose configuration and load have the same names in `old` and mean something else there.

    Raises ConfigError, with the first thing that differs.
    """
    namesakes = [
        before
        for before in old
        if "workload" in before and (before["configuration"], before["load"]) == (row["configuration"], row["load"])
    ]
    if not namesakes or any(_key(before) == _key(row) for before in old):
        return
    for part, what in (("settings", "another configuration"), ("workload", "another workload")):
        for name, now in row[part].items():
            then = namesakes[0][part].get(name)
            if then != _as_json(now):
                raise ConfigError(
                    f"sweep.compare: {row['configuration']} · {row['load']} is {what} in {folder}: "
                    f"{name} was {then}, and is {now}"
                )


def changes(old: list[Row], new: list[Row]) -> list[str]:
    """One line a row. Rows are the same by configuration, load and workload, whatever they are called.

    Noise is the 95 % interval of the difference: the root of the sum of the squared half-widths.
    """
    known = {_key(row): row for row in old}
    lines = []
    for row in new:
        name = f"{row['configuration']} · {row['load']}"
        before = known.pop(_key(row), None)
        if before is None:
            lines.append(f"{name}: new")
            continue
        if before["status"] != row["status"]:
            lines.append(f"{name}: {before['status']} → {row['status']}")
        if "figures" not in before or "figures" not in row:
            continue
        changed = [change for figure in WATCHED if (change := _change(figure, before, row))]
        elsewhere = "" if before["device"] == row["device"] else f" (on {row['device']}, before on {before['device']})"
        lines.append(f"{name}{elsewhere}: {', '.join(changed) or 'nothing beyond noise'}")
    return lines + [f"{row['configuration']} · {row['load']}: no longer there" for row in known.values()]


def _key(row: Row) -> tuple[str, str, str]:
    return row["identity"], row["load"], json.dumps(row.get("workload"), sort_keys=True)


def _as_json(value: Any) -> Any:
    """The value as it comes back from a file."""
    return json.loads(json.dumps(value))


def _change(figure: str, old: Row, new: Row) -> str | None:
    before, after = old["figures"].get(figure), new["figures"].get(figure)
    widths = [_half_width(row, figure) for row in (old, new)]
    if not before or after is None or math.isnan(after) or None in widths:
        return None  # with few requests the noise is unknown
    noise = math.hypot(*(width for width in widths if width is not None))
    if abs(after - before) <= noise:
        return None
    return f"{figure} {before:.4g} → {after:.4g} ({after / before - 1:+.1%}, noise ±{noise / before:.1%})"


def _half_width(row: Row, figure: str) -> float | None:
    """Half of a figure's 95 % interval; None where an end of it is unknown."""
    low, high = interval(row, figure)
    return None if low is None or high is None else (high - low) / 2
