"""The sweep on the terminal: a table that fills while it runs, or a line a row where there is no terminal."""

import math

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweep.store import Row

SHOWN = (  # heading, figure, format
    ("TTFT p50", "ttft_p50_ms", ".0f"),
    ("p99", "ttft_p99_ms", ".0f"),
    ("TPOT p50", "tpot_p50_ms", ".2f"),
    ("p99", "tpot_p99_ms", ".2f"),
    ("tok/s/user", "tokens_per_s_per_user", ".1f"),
    ("tok/s/GPU", "tokens_per_s_per_gpu", ".1f"),
    ("goodput/s", "goodput_per_s", ".2f"),
    ("errors", "errors", ".0f"),
)
STYLES = {"ok": "green", "limits": "yellow", "wrong": "red", "failed": "red"}


def number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


class Progress:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[Row] = []
        self._doing = ""
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._doing = ""
        if self._console.is_terminal:
            self._live.stop()

    def doing(self, what: str) -> None:
        self._doing = what

    def add(self, row: Row, reused: bool) -> None:
        self._rows.append(row)
        if not self._console.is_terminal:
            found = row.get("figures", {})
            said = ", ".join(f"{name.removesuffix('_ms')} {number(found.get(name), form)}" for _, name, form in SHOWN)
            self._console.print(
                f"{row['configuration']} · {row['load']}: {row['status']}"
                f"{' (measured before)' if reused else ''} · {row.get('reason') or said}",
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
            found = row.get("figures", {})
            cells = [number(found.get(name), form) for _, name, form in SHOWN]
            table.add_row(row["configuration"], row["load"], *cells, Text(row["status"], STYLES[row["status"]]))
        return Group(table, Text(self._doing, "dim"))
