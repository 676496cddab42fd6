"""One verdict over all rows: the configuration to run, or that none is better than the first, which is then kept.

Pure functions over rows. The target is `sweep.objective` over all loads together. Only configurations are chosen that
are ok at each load at which any is.
"""

import json
import math
import re
import shlex
from dataclasses import dataclass

import numpy as np
from omegaconf import OmegaConf
from scipy import stats

from sweep.command import literal
from sweep.settings import SweepConfig
from sweep.store import Row


@dataclass(frozen=True)
class Verdict:
    """The verdict in sentences, the first of which is the decision, and a row of the configuration to run."""

    words: list[str]
    chosen: Row | None


def decide(rows: list[Row], options: SweepConfig) -> Verdict:
    """Choose over the first configuration only what is better beyond noise, and by at least `options.worth`."""
    groups = by_configuration(rows)
    loads = [_load(row) for row in rows if row["status"] == "ok"]
    if not loads:
        reasons = sorted({f"{row['configuration']}: {row['reason']}" for row in rows})
        return Verdict([f"No configuration can be recommended: {'; '.join(reasons)}"], None)
    holding = {name: group for name, group in groups.items() if {_load(row) for row in group if _ok(row)} >= set(loads)}
    others = [_falls_short(group, loads) for name, group in groups.items() if name not in holding]
    if not holding:
        return Verdict(["No configuration can be recommended for all of these loads together.", *others], None)
    first = next(iter(holding.values()))
    kept = f"{'Keep' if first[0] is rows[0] else 'Run'} `{command(first[0])}`"
    over = f"over {len(set(loads))} load{'s' * (len(set(loads)) > 1)}"
    together: list[list[Row]] = []
    apart: list[list[Row]] = []
    for group in list(holding.values())[1:]:
        measured = {row["together"] for row in (*first, *group) if _load(row) in loads}
        (together if len(measured) == 1 else apart).append(group)
    others += [f"{group[0]['configuration']} was measured at another time: sweep.fresh=true tells." for group in apart]
    scores = _scores([first, *together], list(dict.fromkeys(loads)), options.objective)
    if not together:
        return Verdict([f"{kept}: there is nothing else to choose.", *others], first[0])
    if scores is None:
        return Verdict([f"{kept}: {options.objective} has no value in each repeat of each load.", *others], first[0])
    shares, half = differences(scores)
    found = [
        f"{group[0]['configuration']}: {options.objective.removeprefix('-')} {_share(share, options)}, "
        f"±{half:.1%} ({over})"
        for group, share in zip(together, shares, strict=True)
    ]
    best = int(np.argmin(shares))
    name = first[0]["configuration"]
    if shares[best] <= -options.worth and shares[best] + half < 0:
        words = f"Run `{command(together[best][0])}`: {over} it is better than {name} beyond noise."
        return Verdict([words, *found, *others], together[best][0])
    if shares[best] + half < 0:
        words = f"{kept}: what is better is so by less than {options.worth:.0%}."
    elif min(shares) - half >= 0:
        words = f"{kept}: it is the best."
    else:
        words = f"{kept}: the configurations cannot be told apart."
    return Verdict([words, *found, *others], first[0])


def differences(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """How the other columns differ from the first, and half of the 95 % interval that holds for all of these.

    `scores` [repeats, configurations]. Each repeat is a block, whose level is its own (a randomised block design;
    Montgomery, Design and Analysis of Experiments, 4.1), so that drift between the repeats is no noise. What is left
    within them alternates its sign, as the repeats go forth and back. Bonferroni's bound for several differences.
    Infinite with one repeat.
    """
    repeats, configurations = scores.shape
    means = scores.mean(axis=0)
    free = (repeats - 1) * (configurations - 1)
    if not free:
        return means[1:] - means[0], math.inf
    residuals = scores - means - scores.mean(axis=1, keepdims=True) + scores.mean()
    error = math.sqrt(float((residuals**2).sum()) / free * 2 / repeats)
    return means[1:] - means[0], float(stats.t.ppf(1 - 0.025 / (configurations - 1), free)) * error


def drift(rows: list[Row], objective: str) -> str | None:
    """What the first row was the first and the last time that it was measured."""
    name = objective.removeprefix("-")
    for row in rows:
        values = np.array([repeat[name] for repeat in row.get("repeats", ())], dtype=float)  # None becomes nan
        if len(values) > 1 and np.isfinite(values).all() and values[0]:
            return (
                f"{row['configuration']}, {row['load']}, first and last of all: {name} {values[0]:.4g} and "
                f"{values[-1]:.4g} ({values[-1] / values[0] - 1:+.1%})."
            )
    return None


def by_configuration(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each configuration, in the order of their first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["configuration"], []).append(row)
    return groups


def _ok(row: Row) -> bool:
    return bool(row["status"] == "ok")


def _load(row: Row) -> tuple[str, str]:
    return row["load"], json.dumps(row.get("workload"), sort_keys=True)


def _falls_short(group: list[Row], loads: list[tuple[str, str]]) -> str:
    """Where a configuration is not ok although some other is, and why."""
    bad = [f"{row['load']} ({row['reason']})" for row in group if not _ok(row) and _load(row) in loads]
    return f"{group[0]['configuration']} is out{' at ' * bool(bad)}{', '.join(bad) or ': it was not measured there'}."


def _scores(groups: list[list[Row]], loads: list[tuple[str, str]], objective: str) -> np.ndarray | None:
    """[repeats, configurations]: the objective, less is better, as a share of the first configuration's mean, of all
    loads. None where a repeat has no value, or the first configuration's is 0.
    """
    sign, name = (-1.0, objective[1:]) if objective.startswith("-") else (1.0, objective)
    tables = []
    for load in loads:
        of_load = [next(row for row in group if _load(row) == load) for group in groups]
        repeats = min(len(row["repeats"]) for row in of_load)
        values = [[repeat[name] for repeat in row["repeats"][:repeats]] for row in of_load]
        table = np.array(values, dtype=float).T  # None becomes nan
        tables.append(sign * table / abs(table[:, 0].mean()))
    fewest = min(map(len, tables))  # a load that was undecided was measured on
    scores = np.mean([table[:fewest] for table in tables], axis=0)
    return scores if np.isfinite(scores).all() else None


def _share(share: float, options: SweepConfig) -> str:
    """A difference of the score as one of the figure."""
    change = -share if options.objective.startswith("-") else share
    return f"{abs(change):.1%} {'less' if change < 0 else 'more'}"


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


def per_gpu(row: Row) -> str:
    """The unit of `tokens_per_s_per_gpu` after "tokens/s": a CPU counts as one device."""
    return "a GPU" if row["on_gpu"] else "in all"


def buckets_yaml(row: Row) -> str:
    """The row's bucket group as a file for conf/buckets/."""
    keys = {
        key.removeprefix("buckets."): item
        for key, item in row["settings"].items()
        if key.startswith("buckets.") and item is not None
    }
    return f"# {about(row)}\n" + OmegaConf.to_yaml(keys)


def deploy_patch(row: Row) -> str:
    """The row's configuration as a kustomize patch of the Deployment, for `deploy.sh tpN --buckets FILE`.

    All keys of the buckets, whatever the image's defaults are, and what else the row overrides, but for the model, the
    ranks and the device: these are the deployment's. It does not render for pods with another number of GPUs.
    """
    buckets = {key: item for key, item in row["settings"].items() if key.startswith("buckets.") and item is not None}
    words = [f"{key}={literal(item)}" for key, item in buckets.items()]
    ours = ("model", "tp", "buckets", "kernels.device")
    words += [word for word in row["overrides"] if not re.match(rf"({'|'.join(ours)})[.=]", word)]
    container = "/spec/template/spec/containers/0"
    limit = {"op": "test", "path": f"{container}/resources/limits/nvidia.com~1gpu", "value": str(row["gpus"])}
    arguments = [{"op": "add", "path": f"{container}/args/-", "value": word} for word in words]
    return f"# {about(row)}\n" + OmegaConf.to_yaml([limit, *arguments])


def about(row: Row) -> str:
    """Where the row's figures come from, for the comment at the top of a file."""
    return (
        f"{row['load']} on {row['device']}: median TPOT {value(row, 'tpot_p50_ms'):.4g} ms, "
        f"{value(row, 'tokens_per_s_per_gpu'):.4g} tokens/s {per_gpu(row)}"
    )
