"""A sweep's folder: rows as they come, one line of JSON each, so that what is there is valid whenever it ends."""

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = ("configuration", "load", "status")  # first in results.csv, then the figures


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "results.jsonl"
        self._known = {row["key"]: row for row in read_rows(folder)}

    def finished(self, key: str) -> Row | None:
        """A row measured before under the same key, if it was not a failure."""
        row = self._known.get(key)
        return row if row and row["status"] != "failed" else None

    def add(self, row: Row) -> None:
        """A later row of the same key takes the place of an earlier one when they are read."""
        self._known[row["key"]] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(_plain(row)) + "\n")

    def note(self, name: str, value: Any) -> None:
        """A file of its own beside the results, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        partial = path.with_suffix(".partial")
        partial.write_text(value if isinstance(value, str) else json.dumps(_plain(value), indent=1) + "\n")
        partial.replace(path)

    def noted(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None


def read_rows(folder: Path) -> list[Row]:
    """The last row of each key, in the order in which the keys first came. A line cut short by a crash is left out."""
    path, rows = folder / "results.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["key"]] = row
    return list(rows.values())


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row: configuration, load, figures and the half-widths of their intervals."""
    figures = list(dict.fromkeys(name for row in rows for name in row.get("figures", ())))
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*COLUMNS, *figures, *(f"{name}_ci95" for name in figures), "reason"])
        for row in rows:
            found, spread = row.get("figures", {}), row.get("intervals", {})
            out.writerow(
                [
                    *(row[column] for column in COLUMNS),
                    *(found.get(name) for name in figures),
                    *(spread.get(name) for name in figures),
                    row.get("reason"),
                ]
            )


def key_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
