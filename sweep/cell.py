"""A load of a configuration: what its repeats brought so far, and the row that this makes.

Each repeat has a server of its own. Knows nothing of how servers are started or loaded.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from conf.schema import Config
from sweep import measure
from sweep.load import Run
from sweep.server import Samples
from sweep.settings import SweepConfig
from sweep.store import Row

SCRAPED = ("prefix_hit_share", "preemptions")  # figures from the server's metrics, beside those of `measure`


@dataclass(frozen=True)
class Load:
    """One point of the load axis."""

    mode: str  # closed | open
    level: float  # users, or requests a second

    def __str__(self) -> str:
        if self.mode == "open":
            return f"{self.level:g} requests/s"
        return f"{self.level:g} user{'s' * (self.level != 1)}"


class CellFailed(RuntimeError):
    """A load without figures; the message becomes the row's reason."""


@dataclass
class Cell:
    """What is to be measured, and what has been."""

    config: Config
    load: Load
    options: SweepConfig
    about: Row  # the keys of the row that do not come from measuring
    runs: list[Run] = field(default_factory=list)  # one a repeat
    increases: list[Samples] = field(default_factory=list)  # of the server's metrics in each repeat
    stagger: float = 0.0  # seconds between the starts of two users, from the answers so far
    failure: str | None = None
    wrong: str | None = None  # the difference that the correctness gate found
    start: dict[str, float] = field(default_factory=dict)  # seconds of the phases of the first start
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for the same measurement of the same code on the same device."""
        return str(self.about["key"])

    @property
    def identity(self) -> str:
        """Equal for configurations whose servers are the same."""
        return str(self.about["identity"])

    @property
    def overrides(self) -> list[str]:
        """Those of serve.py that give the configuration."""
        return list(self.about["overrides"])

    @property
    def name(self) -> str:
        """The configuration, as the report shows it."""
        return str(self.about["configuration"])

    def wants_more(self) -> bool:
        """Whether another repeat is to come: one of those planned, or one that may decide a limit."""
        if self.failure:
            return False
        if len(self.runs) < self.options.repeats:
            return True
        return len(self.runs) < self.options.max_repeats and self._undecided()

    def add(self, run: Run, increase: Samples) -> None:
        """Take in a repeat. Raises CellFailed if it has no figures."""
        seconds = self.options.seconds
        errors = [record.error for record in run.records if record.error]
        if not run.records:
            raise CellFailed(f"no request was due within {seconds:g} s")
        if len(errors) == len(run.records):
            raise CellFailed(f"no request succeeded: {errors[0]}")
        if not run.opened and all(record.first for record in run.records):
            raise CellFailed(f"no user sent a second request within {seconds:g} s")
        self.runs.append(run)
        self.increases.append(increase)

    def spread_starts(self, run: Run) -> None:
        """From now on the users start spread over the time of one of this run's answers."""
        if lengths := [measure.e2e(record) for record in run.records if not record.error]:
            self.stagger = min(1e-3 * statistics.median(lengths), self.options.seconds / 2) / self.load.level

    def row(self) -> Row:
        """The row over the repeats so far."""
        if self.failure:
            return self.about | {"status": "failed", "reason": self.failure}
        errors = [record.error for run in self.runs for record in run.records if record.error]
        figures, intervals = self._figures(slice(None))
        status, reason = self._status(figures, intervals)
        return self.about | {
            "status": status,
            "reason": reason,
            "figures": figures,
            "intervals": intervals,
            "repeats": [self._figures(slice(i, i + 1))[0] for i in range(len(self.runs))],
            "buckets": _buckets(_sum(self.increases)),
            "error": max(set(errors), key=errors.count) if errors else None,
            "start": self.start,
            "memory": self.memory,
        }

    def _figures(self, repeats: slice) -> tuple[measure.Figures, measure.Intervals]:
        values, intervals = measure.figures(self.runs[repeats], self.options.limits, self.about["gpus"])
        increase = _sum(self.increases[repeats])
        queries = increase.get(("prefix_cache_queries_total",), 0.0)
        hits = increase.get(("prefix_cache_hits_total",), 0.0)
        scraped = hits / queries if queries else 0.0, increase.get(("num_preemptions_total",), 0.0)
        return values | dict(zip(SCRAPED, scraped, strict=True)), intervals

    def _status(self, figures: measure.Figures, intervals: measure.Intervals) -> tuple[str, str | None]:
        done, planned = len(self.runs), self.options.repeats
        fails, undecided = measure.judge(figures, intervals, self.options.limits)
        found = {
            "wrong": self.wrong,
            "partial": f"{done} of {planned} repeats were measured" if done < planned else None,
            "overloaded": measure.overloaded(figures),
            "limits": "; ".join(fails),
            "undecided": "; ".join(undecided),
        }
        return next(((name, why) for name, why in found.items() if why), ("ok", None))

    def _undecided(self) -> bool:
        fails, undecided = measure.judge(*self._figures(slice(None)), self.options.limits)
        return bool(undecided and not fails)


def _sum(increases: list[Samples]) -> Samples:
    names = {name for increase in increases for name in increase}
    return {name: sum(increase.get(name, 0.0) for increase in increases) for name in sorted(names)}


def _buckets(increase: Samples) -> list[dict[str, Any]]:
    """Steps and rows of each bucket while the load ran."""
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for (name, *labels), value in increase.items():
        if name in ("bucket_steps_total", "bucket_rows_used_total", "bucket_rows_padded_total"):
            kind, size = labels
            counts.setdefault((kind, int(size)), {})[name.removeprefix("bucket_").removesuffix("_total")] = int(value)
    return [{"kind": kind, "size": size} | bucket for (kind, size), bucket in counts.items()]
