"""The report's pictures: throughput against speed for one user, latency against load, and the steps of all buckets."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sweep.store import Row
from sweep.verdict import by_configuration, figure, front, knee, per_gpu, value

STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.axisbelow": True,
}
PLAIN = FuncFormatter(lambda number, _: f"{number:,g}")
WIDE = 30  # a log axis from this ratio of the largest to the least latency on


def draw(folder: Path, rows: list[Row], steps: dict[str, Any]) -> list[str]:
    """Write the pictures for which there are figures into `folder`, and return their names.

    `steps`: the content of steps.json, by identity of a configuration.
    """
    rows = [row for row in rows if row.get("figures")]
    with plt.rc_context(STYLE):
        pictures = {"pareto.png": _pareto(rows), "latency.png": _latency(rows), "buckets.png": _buckets(rows, steps)}
    for name, picture in pictures.items():
        (folder / name).unlink(missing_ok=True)
        if picture:
            picture.savefig(folder / name, bbox_inches="tight")
            plt.close(picture)
    return [name for name, picture in pictures.items() if picture]


def in_common(names: list[str]) -> set[str]:
    """Overrides that all configurations have, if there are several configurations."""
    return set.intersection(*(set(name.split()) for name in names)) if len(set(names)) > 1 else set()


def short_names(names: list[str]) -> dict[str, str]:
    """Each name without the overrides that all have: legends and tables have little room."""
    common = in_common(names)
    return {name: " ".join(word for word in name.split() if word not in common) or "defaults" for name in names}


def _pareto(rows: list[Row]) -> Figure | None:
    rows = [row for row in rows if value(row, "tokens_per_s_per_user")]
    if not rows:
        return None
    picture, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    groups = by_configuration(rows)
    names = short_names(list(groups))
    for number, (configuration, group) in enumerate(groups.items()):
        group = sorted(group, key=lambda row: (row["mode"], row["level"]))
        beside: dict[str, Any] = {"xytext": (-6, -5), "ha": "right", "va": "top"} if number % 2 else {"xytext": (6, 5)}
        x, y = _points(group)
        (line,) = axes.plot(x, y, "o-", linewidth=1, markersize=5, alpha=0.9, label=names[configuration])
        for row, at in zip(group, zip(x, y, strict=True), strict=True):
            axes.annotate(row["load"], at, textcoords="offset points", fontsize=7, color=line.get_color(), **beside)
        faulty = [row for row in group if row["status"] != "ok"]
        axes.plot(*_points(faulty), "x", color="#c00000", markersize=9, zorder=4)
    best = sorted(front(rows, "tpot_mean_ms"), key=lambda row: figure(row, "tokens_per_s_per_user"))
    axes.plot(
        *_points(best),
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="#222222",
        linestyle="none",
        label="front: no load is better in both",
        zorder=3,
    )
    if any(row["status"] != "ok" for row in rows):
        axes.plot([], [], "x", color="#c00000", label="overloaded, breaks a limit, cannot tell, or wrong")
    axes.set(xlabel="tokens/s a user", ylabel=f"tokens/s {per_gpu(rows[0])}")
    axes.set_xlim(0, 1.12 * max(figure(row, "tokens_per_s_per_user") for row in rows))
    axes.set_ylim(0, 1.12 * max(figure(row, "tokens_per_s_per_gpu") for row in rows))
    picture.legend(loc="outside lower center", ncols=1 if max(map(len, names.values())) > 40 else 2, fontsize=8)
    return picture


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    users = [figure(row, "tokens_per_s_per_user") for row in rows]
    return users, [figure(row, "tokens_per_s_per_gpu") for row in rows]


def _latency(rows: list[Row]) -> Figure | None:
    modes = [mode for mode in ("closed", "open") if any(row["mode"] == mode for row in rows)]
    if not modes:
        return None
    picture, grid = plt.subplots(len(modes), 2, figsize=(9, 3.4 * len(modes)), layout="constrained", squeeze=False)
    groups = by_configuration(rows)
    names = short_names(list(groups))
    for mode, panels in zip(modes, grid, strict=True):
        unit = "users" if mode == "closed" else "requests/s"
        levels = sorted({row["level"] for row in rows if row["mode"] == mode})
        for axes, latency, title in zip(
            panels, ("ttft", "tpot"), ("time to first token", "time per output token"), strict=True
        ):
            for number, (configuration, group) in enumerate(groups.items()):
                group = sorted((row for row in group if row["mode"] == mode), key=lambda row: row["level"])
                color = f"C{number % 10}"
                for percentile, style, alpha in ((50, "o-", 1), (90, "s:", 0.6), (99, "^--", 0.9)):
                    name = f"{latency}_p{percentile}_ms"
                    points = [(row["level"], at) for row in group if (at := value(row, name)) is not None]
                    label = names[configuration] if percentile == 50 else None
                    if points:
                        axes.plot(
                            *zip(*points, strict=True),
                            style,
                            color=color,
                            markersize=4,
                            linewidth=1.1,
                            alpha=alpha,
                            label=label,
                        )
                bend = knee(group)
                # A knee at the first or last load says nothing: the loads may not reach beyond it.
                inside = bend is not None and group[0] is not bend is not group[-1]
                if bend and inside and (at := value(bend, f"{latency}_p50_ms")) is not None:
                    axes.plot(bend["level"], at, "o", markersize=12, markerfacecolor="none", markeredgecolor=color)
            axes.set_xscale("log", base=2)
            axes.set_xticks(levels)
            axes.xaxis.set_major_formatter(PLAIN)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set(xlabel=unit, ylabel="ms", title=title)
            drawn = [at for line in axes.lines for at in line.get_ydata()]
            if 0 < WIDE * min(drawn, default=0) < max(drawn, default=0):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(PLAIN)
            else:
                axes.set_ylim(bottom=0)
    for style, label in (("o-", "p50"), ("s:", "p90 (first token)"), ("^--", "p99")):
        grid[0][0].plot([], [], style, color="#555555", markersize=4, label=label)
    grid[0][0].plot(
        [], [], "o", markersize=10, markerfacecolor="none", color="#555555", label="knee: greatest throughput / delay"
    )
    handles, labels = grid[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return picture


def _buckets(rows: list[Row], steps: dict[str, Any]) -> Figure | None:
    """Decode steps as a share of the memory floor if that is known, or else milliseconds of all steps."""
    timed = {row["identity"]: steps[row["identity"]] for row in rows if "steps" in steps.get(row["identity"], {})}
    if not timed:
        return None
    names = short_names([timing["configuration"] for timing in timed.values()])
    floor = all(timing["read_bandwidth"] for timing in timed.values())
    kinds = ("decode",) if floor else ("decode", "prefill")
    picture, panels = plt.subplots(
        1, len(kinds), figsize=(4.5 * len(kinds) + 0.5 * floor, 3.4), layout="constrained", squeeze=False
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        sizes = sorted({row["size"] for timing in timed.values() for row in timing["steps"] if row["kind"] == kind})
        width = min(0.3, 0.8 / len(timed))
        for number, timing in enumerate(timed.values()):
            known = {row["size"]: row for row in timing["steps"] if row["kind"] == kind}
            at = [index + width * (number + 0.5 - len(timed) / 2) for index, size in enumerate(sizes) if size in known]
            heights = [
                100 * known[size]["share_of_floor"] if floor else known[size]["ms"] for size in sizes if size in known
            ]
            bars = axes.bar(at, heights, width * 0.92, label=names[timing["configuration"]])
            if len(timed) * len(sizes) <= 16:
                axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("rows" if kind == "decode" else "packed tokens")
        axes.set_ylabel("% of the memory floor" if floor else "ms a step")
        axes.set_title(f"{kind} buckets")
        if floor:
            axes.set_ylim(0, 105)
    handles, labels = panels[0][0].get_legend_handles_labels()
    picture.legend(
        handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 40 else 2, fontsize=8
    )
    return picture
