"""What changed between two sweeps beyond noise, row by row."""

import math

from sweep.store import Row

WATCHED = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "tokens_per_s_per_gpu")


def changes(old: list[Row], new: list[Row]) -> list[str]:
    """A line a row. Noise is the 95 % interval of the difference: the root of the sum of both intervals' squares."""
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
        said = [found for figure in WATCHED if (found := _change(figure, before, row))]
        elsewhere = "" if before["device"] == row["device"] else f" (on {row['device']}, before on {before['device']})"
        lines.append(f"{name}{elsewhere}: {', '.join(said) or 'nothing beyond noise'}")
    return lines + [f"{configuration} · {load}: no longer there" for configuration, load in known]


def _change(figure: str, old: Row, new: Row) -> str | None:
    was, now = old["figures"].get(figure), new["figures"].get(figure)
    spread = [row["intervals"].get(figure) for row in (old, new)]
    if None in (was, now, *spread) or not was or any(math.isnan(width) for width in spread):
        return None  # without repeats nobody knows the noise
    noise = math.hypot(*spread)
    if abs(now - was) <= noise:
        return None
    return f"{figure} {was:.4g} → {now:.4g} ({now / was - 1:+.1%}, noise ±{noise / was:.1%})"
