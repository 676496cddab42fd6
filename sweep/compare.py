"""What changed between two sweeps by more than noise, row by row."""

import math

from sweep.store import Row
from sweep.verdict import interval

WATCHED = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "tokens_per_s_per_gpu")


def changes(old: list[Row], new: list[Row]) -> list[str]:
    """One line a row. Noise is the 95 % interval of the difference: the root of the sum of the squared half-widths."""
    known = {(row["configuration"], row["load"]): row for row in old}
    lines = []
    for row in new:
        name = f"{row['configuration']} · {row['load']}"
        before = known.pop((row["configuration"], row["load"]), None)
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
    return lines + [f"{configuration} · {load}: no longer there" for configuration, load in known]


def _change(figure: str, old: Row, new: Row) -> str | None:
    before, after = old["figures"].get(figure), new["figures"].get(figure)
    widths = [_half_width(row, figure) for row in (old, new)]
    if not before or after is None or math.isnan(after) or None in widths:
        return None  # with a single repeat, or with few requests, the noise is unknown
    noise = math.hypot(*(width for width in widths if width is not None))
    if abs(after - before) <= noise:
        return None
    return f"{figure} {before:.4g} → {after:.4g} ({after / before - 1:+.1%}, noise ±{noise / before:.1%})"


def _half_width(row: Row, figure: str) -> float | None:
    """Half of a figure's 95 % interval; None where an end of it is unknown."""
    low, high = interval(row, figure)
    return None if low is None or high is None else (high - low) / 2
