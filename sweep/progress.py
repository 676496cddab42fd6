"""The sweep on the terminal: a table that grows while it runs; without a terminal, one line a row."""

import math

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweep.store import Row

SHOWN = (  # heading, figure, format
    ("n", "n", ".0f"),
    ("TTFT p50", "ttft_p50_ms", ".0f"),
    ("p99", "ttft_p99_ms", ".0f"),
    ("TPOT p50", "tpot_p50_ms", ".2f"),
    ("p99", "tpot_p99_ms", ".2f"),
    ("tok/s/user", "tokens_per_s_per_user", ".1f"),
    ("tok/s/GPU", "tokens_per_s_per_gpu", ".1f"),
    ("offered/s", "offered_per_s", ".3g"),
    ("served/s", "served_per_s", ".3g"),
    ("goodput/s", "goodput_per_s", ".2f"),
    ("errors", "errors", ".0f"),
)
STYLES = {
    "ok": "green",
    "overloaded": "yellow",
    "limits": "yellow",
    "undecided": "yellow",
    "partial": "yellow",
    "wrong": "red",
    "failed": "red",
}


def number(value: float | None, form: str) -> str:
    """The value formatted; a dash if there is none."""
    return "-" if value is None or math.isnan(value) else format(value, form)


class Progress:
    """Shows the rows that are finished and what is being done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[Row] = []
        self._activity = ""
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._activity = ""
        if self._console.is_terminal:
            self._live.stop()

    def doing(self, activity: str) -> None:
        """Show what the sweep does now."""
        self._activity = activity

    def add(self, row: Row, reused: bool) -> None:
        """Show a finished row; `reused`: it was measured by an earlier run."""
        self._rows.append(row)
        if not self._console.is_terminal:
            figures = row.get("figures", {})
            cells = (f"{name.removesuffix('_ms')} {number(figures.get(name), form)}" for _, name, form in SHOWN)
            self._console.print(
                f"{row['configuration']} · {row['load']}: {row['status']}"
                f"{' (measured before)' if reused else ''} · {row.get('reason') or ', '.join(cells)}",
                soft_wrap=True,
                highlight=False,
            )

    def _render(self) -> Group:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("configuration", overflow="fold")
        table.add_column("load")
        on_gpu = all(row.get("on_gpu", True) for row in self._rows)
        for heading, *_ in SHOWN:
            table.add_column(heading if on_gpu else heading.replace("/GPU", " in all"), justify="right")
        table.add_column("")
        for row in self._rows:
            figures = row.get("figures", {})
            cells = [number(figures.get(name), form) for _, name, form in SHOWN]
            table.add_row(row["configuration"], row["load"], *cells, Text(row["status"], STYLES[row["status"]]))
        return Group(table, Text(self._activity, "dim"))
