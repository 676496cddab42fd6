"""A sweep's folder. Rows are appended as lines of JSON, so that the file is valid whenever the sweep ends."""

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # one load of one configuration; `runner` writes the keys
COLUMNS = ("configuration", "load", "status")  # the first columns of results.csv, before the figures


class Store:
    """The folder of one sweep, which may hold the rows of an earlier run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "results.jsonl"
        self._known = {row["key"]: row for row in read_rows(folder)}

    def finished(self, key: str) -> Row | None:
        """The row that was measured earlier under this key, unless it failed or was interrupted."""
        row = self._known.get(key)
        return row if row and row["status"] not in ("failed", "partial") else None

    def add(self, row: Row) -> None:
        """Append a row. When rows are read, the last one of a key counts."""
        self._known[row["key"]] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(_plain(row)) + "\n")

    def note(self, name: str, value: Any) -> None:
        """Write a file beside the results: text as it is, anything else as JSON. It appears complete, by a rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        partial = path.with_suffix(".partial")
        partial.write_text(value if isinstance(value, str) else json.dumps(_plain(value), indent=1) + "\n")
        partial.replace(path)

    def noted(self, name: str) -> Any:
        """The content of a JSON file that `note` wrote; None if there is none."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None


def read_rows(folder: Path) -> list[Row]:
    """The last row of each key, in the order of the keys' first rows. A line cut short by a crash is skipped."""
    path = folder / "results.jsonl"
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["key"]] = row
    return list(rows.values())


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row: configuration, load, status, figures and the ends of their 95 % intervals."""
    figures = list(dict.fromkeys(name for row in rows for name in row.get("figures", ())))
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        ends = [f"{name}_ci95_{end}" for name in figures for end in ("low", "high")]
        out.writerow([*COLUMNS, *figures, *ends, "reason"])
        for row in rows:
            values, intervals = row.get("figures", {}), row.get("intervals", {})
            out.writerow(
                [
                    *(row[column] for column in COLUMNS),
                    *(values.get(name) for name in figures),
                    *(end for name in figures for end in intervals.get(name, (None, None))),
                    row.get("reason"),
                ]
            )


def key_of(*parts: Any) -> str:
    """A short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """The value with nan and infinity replaced by null, since JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
