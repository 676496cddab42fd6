"""The report: verdict and tables in Markdown, the same page as self-contained HTML, and files ready for use."""

import base64
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console

from sweep import compare, plots, verdict
from sweep.settings import SweepConfig
from sweep.store import Row, Store, write_csv
from sweep.verdict import Verdict, value

CAPTIONS = {
    "pareto.png": "Speed for one user against total throughput. Each point is one load; up and right is better.",
    "latency.png": "Latency against load. The knee is ringed if the loads reach beyond it.",
    "buckets.png": "The step of each bucket alone, without HTTP.",
}
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; margin: 1rem 0 }
th, td { padding: .25rem .45rem; border-bottom: 1px solid #ddd; white-space: nowrap; text-align: right }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11rem }
td:last-child, th:last-child { text-align: left }
img { max-width: 100% } code { background: #f2f2f2; padding: .1rem .3rem; border-radius: 3px; font-size: 13px }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.2rem }
"""


def write_report(
    store: Store,
    rows: list[Row],
    earlier: list[Row],
    options: SweepConfig,
    environment: dict[str, Any],
    console: Console,
) -> None:
    """Write everything in the sweep's folder but the rows, and print the verdict.

    `earlier`: the rows of the sweep to compare with, if there is one.
    """
    folder, steps = store.folder, store.noted("steps.json") or {}
    write_csv(folder / "results.csv", rows)
    pictures = plots.draw(folder, rows, steps)
    changed = compare.changes(earlier, rows) if options.compare else None
    decided = verdict.decide(rows, options)
    page = markdown(rows, options, environment, steps, pictures, decided, changed)
    store.note("report.md", page)
    store.note("report.html", html(page, folder, options.name))
    for outdated in folder.glob("choice*"):
        outdated.unlink()
    if decided.chosen:
        store.note("choice.buckets.yaml", verdict.buckets_yaml(decided.chosen))
        if decided.chosen["on_gpu"]:
            store.note("choice.patch.yaml", verdict.deploy_patch(decided.chosen))
    lines = decided.words + ([] if changed is None else [f"Against {options.compare}:", *changed])
    console.print(
        "", *lines, f"Report: {folder / 'report.html'}", sep="\n", highlight=False, markup=False, soft_wrap=True
    )


def markdown(
    rows: list[Row],
    options: SweepConfig,
    environment: dict[str, Any],
    steps: dict[str, Any],
    pictures: list[str],
    decided: Verdict,
    changed: list[str] | None,
) -> str:
    """The report's page. `steps`: the content of steps.json; `changed`: lines of `compare.changes`, if asked for."""
    shared = plots.in_common([row["configuration"] for row in rows])
    sections: list[str | None] = [
        f"# Sweep: {options.name}",
        _conditions(options, environment),
        "## Verdict",
        *_verdict(decided),
        verdict.drift(rows, options.objective),
    ]
    if shared:
        sections.append(f"All configurations have `{'`, `'.join(sorted(shared))}`, left out of the names below.")
    if changed is not None:
        sections += [
            f"## Against {options.compare}",
            "Measured at another time: what the machine itself gained or lost since then is in these differences.",
            "\n".join(f"- {line}" for line in changed),
        ]
    for name in pictures:
        sections += [f"![{name}]({name})", f"*{CAPTIONS[name]}*"]
    sections += [
        "## Latency and throughput",
        "Milliseconds and tokens/s. Percentiles are of the n requests of all repeats; a p99 takes 100 of them, a p90 "
        "10. In brackets the 95 % interval; “?”: too few requests to bound it. TTFT counts from when a request was "
        "due; that of each user's first request is told apart and in no other latency. Goodput is "
        "requests/s within the limits.",
        _figures(rows),
    ]
    if faulty := [row for row in rows if row.get("reason") or row.get("error")]:
        sections += [
            "### What went wrong",
            "\n".join(
                f"- {row['configuration']}, {row['load']}: {row['status']}, "
                f"{'; '.join(filter(None, (row.get('reason'), row.get('error'))))}"
                for row in faulty
            ),
        ]
    sections += ["## Start and memory", _starts(rows), "## Buckets", *_buckets(rows, steps)]
    return "\n\n".join(section for section in sections if section) + "\n"


def html(page: str, folder: Path, title: str) -> str:
    """The page as one file that refers to no other: pictures are embedded."""
    body: str = MarkdownIt("commonmark").enable("table").render(page)

    def embedded(source: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / source[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([\w.]+\.png)"', embedded, body)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Sweep: {title}</title><style>{CSS}</style></head><body>'
        f"{body}</body></html>\n"
    )


def _conditions(options: SweepConfig, environment: dict[str, Any]) -> str:
    device = environment["device"]
    if environment["gpus"]:
        device = f"{len(environment['gpus'])} x {device}, driver {environment['gpus'][0]['driver']}"
    else:
        device += f", {environment['cores']} cores"
    versions = ", ".join(f"{name} {release}" for name, release in environment["packages"].items())
    lengths = f"Prompts of {options.prompt_tokens} tokens and answers of {options.output_tokens}"
    lengths = f"Prompts from `{options.prompts}`" if options.prompts else lengths
    drawn = [
        f"{name} drawn lognormal with sigma {sigma:g}"
        for name, sigma in (("prompts", options.prompt_sigma), ("answers", options.output_sigma))
        if sigma
    ]
    limits = {name: limit for name, limit in asdict(options.limits).items() if limit is not None}
    return (
        f"{device}; commit {environment['commit']}; Python {environment['python']}, {versions}. "
        f"{'; '.join([lengths, *drawn])}; "
        f"{options.repeats} repeat{'s' * (options.repeats != 1)} of at most {options.seconds:g} s; "
        f"seed {options.seed}; limits: {', '.join(f'{name} {limit:g}' for name, limit in limits.items())}."
    )


def _verdict(decided: Verdict) -> list[str]:
    first, *others = decided.words
    files = []
    if decided.chosen:
        files.append("`choice.buckets.yaml` goes to `conf/buckets/`")
        if decided.chosen["on_gpu"]:
            files.append(f"`deploy.sh tp{decided.chosen['gpus']} --buckets choice.patch.yaml` deploys it")
    return [first, "\n".join(f"- {line}" for line in others), f"As files: {'; '.join(files)}." if files else ""]


def _names(rows: list[Row]) -> dict[str, str]:
    return plots.short_names([row["configuration"] for row in rows])


def _per_gpu(rows: list[Row]) -> str:
    return next((verdict.per_gpu(row) for row in rows if "on_gpu" in row), "a GPU")


def _table(heading: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, rule, *lines))


def _number(number: float | None, form: str = "#.3g") -> str:
    """Three significant digits, or all digits before the point if there are more; counts in full."""
    if number is None:
        return "-"
    if isinstance(number, int) or (form.endswith("g") and abs(number) >= 99.95):
        return f"{number:,.0f}"
    return format(number, form)


def _with_interval(row: Row, name: str) -> str:
    at = value(row, name)
    if at is None:
        return "-"
    low, high = verdict.interval(row, name)
    return _number(at) + (f" ({_number(low)} to {'?' if high is None else _number(high)})" if low is not None else "")


def _figures(rows: list[Row]) -> str:
    before = ("ttft_p50_ms", "ttft_p90_ms")
    after = ("itl_p50_ms", "itl_p99_ms", "e2e_p50_ms", "e2e_p99_ms")
    heading = [
        "configuration",
        "load",
        "n",
        "first TTFT",
        "TTFT p50",
        "p90",
        "p99",
        "TPOT p50",
        "p99",
        "ITL p50",
        "p99",
        "E2E p50",
        "p99",
        "tok/s a user",
        f"tok/s {_per_gpu(rows)}",
        "offered/s",
        "served/s",
        "goodput",
        "errors",
        "prefix hits",
        "verdict",
    ]
    names = _names(rows)
    lines = [
        [
            names[row["configuration"]],
            row["load"],
            _number(value(row, "n")),
            _number(value(row, "first_ttft_mean_ms")),
            *(_number(value(row, name)) for name in before),
            _with_interval(row, "ttft_p99_ms"),
            _with_interval(row, "tpot_p50_ms"),
            _with_interval(row, "tpot_p99_ms"),
            *(_number(value(row, name)) for name in after),
            _number(value(row, "tokens_per_s_per_user")),
            _with_interval(row, "tokens_per_s_per_gpu"),
            _number(value(row, "offered_per_s")),
            _number(value(row, "served_per_s")),
            _number(value(row, "goodput_per_s")),
            _number(value(row, "errors")),
            _number(value(row, "prefix_hit_share"), ".0%"),
            row["status"],
        ]
        for row in rows
    ]
    return _table(heading, lines)


def _starts(rows: list[Row]) -> str | None:
    started = {row["identity"]: row for row in rows if row.get("start")}
    if not started:
        return None
    phases = list(dict.fromkeys(name for row in started.values() for name in row["start"]))
    uses = list(dict.fromkeys(name for row in started.values() for name in row["memory"]))
    names = _names(rows)
    lines = [
        [
            names[row["configuration"]],
            *(_number(row["start"].get(name), ".2f") for name in phases),
            *(_number(row["memory"].get(name, 0) / 2**30, ".2f") for name in uses),
        ]
        for row in started.values()
    ]
    return _table(["configuration", *(f"{name}, s" for name in phases), *(f"{name}, GiB" for name in uses)], lines)


def _buckets(rows: list[Row], steps: dict[str, Any]) -> list[str]:
    """A table for each configuration: the step of each bucket alone, and how the loads used the bucket."""
    sections = [
        "The step of each bucket alone, the median of six, and its use by all loads together. “Saves” is how much "
        "faster its step is than that of the next larger bucket; in brackets, the same times the number of its steps. "
        "“Noise”: the ranges of the two steps overlap."
    ]
    names = _names(rows)
    for configuration, group in verdict.by_configuration([row for row in rows if row.get("buckets")]).items():
        known = steps.get(group[0]["identity"], {})
        timed = {(step["kind"], step["size"]): step for step in known.get("steps", ())}
        used: dict[tuple[str, int], list[int]] = {}
        for row in group:
            for bucket in row["buckets"]:
                counts = used.setdefault((bucket["kind"], bucket["size"]), [0, 0, 0])
                for index, name in enumerate(("steps", "rows_used", "rows_padded")):
                    counts[index] += bucket[name]
        lines = []
        for (kind, size), (taken, filled, padded) in sorted(used.items()):
            step = timed.get((kind, size), {})
            larger = min((key for key in timed if key[0] == kind and key[1] > size), default=None)
            saving = _saving(step, timed[larger], taken) if larger and step else "-"
            read = step.get("bytes")
            lines.append(
                [
                    f"{kind} {size}",
                    _number(step.get("ms")),
                    _number(step.get("tokens_per_s")),
                    _number(read / 1e9 if read else None),
                    _number(step.get("share_of_floor"), ".0%"),
                    f"{taken:,}",
                    _number(filled / (filled + padded) if taken else None, ".0%"),
                    f"{padded:,}",
                    saving,
                ]
            )
        rate = known.get("read_bandwidth")
        sections += [
            f"### {names[configuration]}",
            f"Read bandwidth {rate / 1e12:.2f} TB/s." if rate else "",
            f"The steps could not be timed: {known['reason']}" if known.get("reason") else "",
            _table(["bucket", "ms", "tokens/s", "GB", "of floor", "steps", "rows used", "rows padded", "saves"], lines),
        ]
    return sections if len(sections) > 1 else []


def _saving(step: dict[str, Any], larger: dict[str, Any], taken: int) -> str:
    if step["ms_range"][1] >= larger["ms_range"][0]:
        return "noise"
    saved = larger["ms"] - step["ms"]
    return f"{_number(saved)} ms ({_number(saved * taken / 1e3)} s)"
