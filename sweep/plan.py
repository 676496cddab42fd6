"""What a sweep would measure and how long that would take: what `sweep.dry_run` prints."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from sweep import measure
from sweep.cell import Cell

START_SECONDS = 30  # a guess at what a start takes


@dataclass
class Planned:
    """A row, and the seconds that it takes at most."""

    configuration: str
    load: str
    seconds: float
    misfit: str | None = None  # why it cannot run
    known: bool = False  # it was measured before


class Plan:
    """The rows in the order of their first repeats."""

    def __init__(self) -> None:
        self._rows: list[Planned] = []

    def add(self, cells: list[Cell], known: list[bool], gpus: list[dict[str, Any]]) -> None:
        """The loads of one configuration. `known`: those that were measured before."""
        from sweep.fit import misfit  # here, because only a plan needs torch

        why = misfit(cells[0].config, gpus)
        for cell, measured in zip(cells, known, strict=True):
            options = cell.options
            started = any(row.seconds and row.configuration == cell.name for row in self._rows)
            repeats = options.max_repeats if measure.limited(options.limits) else options.repeats
            seconds = repeats * (options.seconds * (1 + (options.warmup > 0)) + (0 if started else START_SECONDS))
            seconds += 0 if started or not options.steps else START_SECONDS
            self._rows.append(Planned(cell.name, str(cell.load), 0 if why or measured else seconds, why, measured))

    def refuse(self, configuration: str, load: str, reason: str) -> None:
        """A row that cannot be."""
        self._rows.append(Planned(configuration, load, 0, reason))

    def show(self, console: Console) -> None:
        """Print it, unless it is empty."""
        if not self._rows:
            return
        total = sum(row.seconds for row in self._rows)
        console.print(f"{len(self._rows)} rows, at most about {total / 60:.1f} minutes, in this order, then back:")
        for number, row in enumerate(self._rows, 1):
            why = f"  [red]does not fit: {escape(row.misfit)}[/]" if row.misfit else f"  {row.seconds:.0f} s"
            why = "  measured before" if row.known else why
            console.print(
                f"{number:>4}  {escape(row.configuration)} · {row.load}{why}", highlight=False, soft_wrap=True
            )
