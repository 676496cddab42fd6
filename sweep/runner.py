"""The sweep: rounds over all rows, forth and back, with a server started anew for each configuration in each round.

So every row is measured at the same mean time, and a machine that drifts evenly favours none (A B B A); the first row
is measured again at the end. A failure costs only its own rows. Hydra calls `run` once for each job. The jobs of its
own sweeper are measured together, by `measure`. Any other sweeper chooses its next job by the objective of the last:
its jobs are measured one by one.
"""

import asyncio
import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

from conf import schema
from conf.schema import Config, ConfigError, Device
from engine.lifetime import dying_with_parent
from sweep import compare, gate, load, measure, settings, workload
from sweep.cell import SCRAPED, Cell, CellFailed, Load
from sweep.client import http_sender
from sweep.command import flat, identity, overrides
from sweep.environment import environment
from sweep.plan import Plan
from sweep.progress import Progress
from sweep.report import write_report
from sweep.server import ROOT, Samples, Server, ServerFailed
from sweep.settings import SweepConfig
from sweep.store import Row, Store, key_of
from sweep.workload import Workload


@dataclass
class Started:
    """The running server and what is known of it."""

    identity: str
    server: Server
    wrong: str | None  # the difference that the correctness gate found


class Sweep:
    """A context manager; its end, also by an exception, stops the server and writes the report over the rows so far."""

    def __init__(self, console: Console, command: tuple[str, ...]) -> None:
        """`command` starts a server; overrides are appended to it."""
        self._console = console
        self._command = command
        self._progress = Progress(console)
        self._current: Started | None = None
        self._failures: dict[str, str] = {}  # why configurations did not start; they are not tried again
        self._opened: Store | None = None  # by the first job
        self._options: SweepConfig | None = None  # of the first job
        self._cells: dict[str, Cell] = {}  # to measure, by key: a sweeper may run the same job twice
        self._rows: dict[str, Row] = {}  # by key
        self._earlier: list[Row] = []  # of the sweep to compare with
        self._plan = Plan()
        self._environment: dict[str, Any] = {}

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second signal must not leave a server behind
            signal.signal(number, signal.SIG_IGN)
        self._progress.__exit__()
        self._release()
        self._plan.show(self._console)
        rows = [row for row in self._rows.values() if row]
        if self._options and rows:
            write_report(self._store, rows, self._earlier, self._options, self._environment, self._console)

    @property
    def _store(self) -> Store:
        assert self._opened is not None, "the first job opens it"
        return self._opened

    def run(self, composed: Any) -> float:
        """Take in one Hydra job. Returns the worst objective of its loads, or 0 if `measure` is to measure them.

        Raises ConfigError for invalid `sweep` keys, and for an earlier sweep that cannot be compared with.
        """
        options = settings.load(composed)
        _require_usable(options)
        if self._options is None:
            self._begin(options, composed)
        loads = [Load("closed", n) for n in options.concurrency] + [Load("open", rate) for rate in options.rate]
        plain = OmegaConf.create({key: value for key, value in composed.items() if key != "sweep"})
        hydra = HydraConfig.get()
        try:
            config = schema.load(plain)
            Workload(options, config)  # lengths that its context cannot hold are refused before its server starts
        except ConfigError as error:
            name = " ".join(o for o in hydra.overrides.task if not o.lstrip("+").startswith("sweep"))
            return max([self._refused(name or "defaults", str(load), str(error), options) for load in loads])
        words = overrides(config, dict(hydra.runtime.choices))
        cells = [self._cell(config, words, load, options) for load in loads]
        for cell in cells:
            compare.require_alike(self._earlier, cell.about, str(options.compare))
        if options.dry_run:
            measured = [self._finished(cell) is not None for cell in cells]
            self._plan.add(cells, measured, self._environment["gpus"])
            return 0.0
        for cell in cells:
            key = cell.key
            if known := self._finished(cell):
                self._rows[key] = known
                self._progress.add(known, True)
            elif key not in self._rows:
                self._rows[key] = {}  # its place in the order
                self._cells[key] = cell
        if hydra.runtime.choices["hydra/sweeper"] == "basic":
            return 0.0
        self.measure()
        return max(self._objective(self._rows[cell.key], options) for cell in cells)

    def measure(self) -> None:
        """Measure what the jobs so far have asked for, in rounds."""
        cells, self._cells = list(self._cells.values()), {}
        together = datetime.now(UTC).isoformat(timespec="seconds")
        for cell in cells:
            cell.about["together"] = together
        forth = True
        while wanted := [cell for cell in cells if cell.wants_more()]:
            for cell in wanted if forth else reversed(wanted):
                self._repeat(cell)
            self._release()
            forth = not forth

    def _begin(self, options: SweepConfig, composed: Any) -> None:
        self._options, self._environment = options, environment(ROOT)
        self._opened = Store(Path(options.folder))
        self._earlier = compare.earlier(options.compare) if options.compare else []
        if options.dry_run:
            return
        for line in self._environment["busy"]:
            self._console.print(f"A GPU is in use, by what may be left over: {line}", highlight=False, markup=False)
        self._progress.__enter__()
        resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        self._store.note("environment.json", self._environment | {"configuration": resolved})

    def _cell(self, config: Config, words: list[str], load: Load, options: SweepConfig) -> Cell:
        where = {name: self._environment[name] for name in ("commit", "device")}
        on_gpu = bool(self._environment["gpus"]) and config.kernels.device is not Device.cpu
        gpus = config.tp if on_gpu else 1  # a machine without GPUs counts as one
        name = identity(config)
        what = workload.about(options)
        about: Row = {
            "key": key_of(name, asdict(load), what, _measured_with(options), *where.values()),
            "identity": name,
            "configuration": " ".join(words) or "defaults",
            "overrides": words,
            "load": str(load),
            **asdict(load),
            **where,
            "gpus": gpus,
            "on_gpu": on_gpu,
            "workload": what,
            "settings": flat(config),
        }
        return Cell(config, load, options, about)

    def _finished(self, cell: Cell) -> Row | None:
        """The row of an earlier run. None without a commit: then nothing tells whether the code is the same."""
        if not self._environment["commit"] or cell.options.fresh:
            return None
        return self._store.finished(cell.key)

    def _repeat(self, cell: Cell) -> None:
        """Measure a cell once more and write its row."""
        try:
            started = self._server_for(cell)
            cell.wrong = cell.wrong or started.wrong
            before = started.server.scrape()
            run = asyncio.run(self._load(cell, started.server))
            after = started.server.scrape()
            cell.add(run, {name: value - before.get(name, 0.0) for name, value in after.items()})
        except (CellFailed, ServerFailed, gate.GateFailed) as error:
            cell.failure = str(error)
            self._release()
        row = cell.row() | {"at": datetime.now(UTC).isoformat(timespec="seconds")}
        self._store.add(row)
        self._rows[row["key"]] = row
        if not cell.wants_more():
            self._progress.add(row, False)

    def _refused(self, name: str, load: str, reason: str, options: SweepConfig) -> float:
        """Write the row of a configuration that cannot be, or not with these lengths; its objective is infinite."""
        row: Row = {
            "key": key_of(name, load),
            "identity": name,
            "configuration": name,
            "overrides": name.split(),
            "load": load,
            "status": "failed",
            "reason": reason,
        }
        if options.dry_run:
            self._plan.refuse(name, load, reason)
        else:
            self._store.add(row)
            self._rows[row["key"]] = row
            self._progress.add(row, False)
        return math.inf

    @staticmethod
    def _objective(row: Row, options: SweepConfig) -> float:
        if row["status"] not in ("ok", "undecided"):
            return math.inf
        figures = {name: math.nan if value is None else value for name, value in row["figures"].items()}
        return measure.objective(figures, options.objective)

    def _server_for(self, cell: Cell) -> Started:
        """The running server if it has the cell's configuration, or else a new one: started and checked.

        Before its first start the steps are timed. Raises CellFailed, ServerFailed, GateFailed.
        """
        name, options = cell.identity, cell.options
        if self._current and self._current.identity == name:
            return self._current
        if name in self._failures:
            raise CellFailed(self._failures[name])
        self._release()
        if options.steps and not cell.runs:
            self._progress.doing(f"{cell.name}: timing every bucket's step")
            self._time_steps(cell)
        self._progress.doing(f"{cell.name}: starting the server")
        server = Server(self._command, cell.overrides, self._store.folder / "logs" / f"{name}.log")
        current = self._current = Started(name, server, None)
        try:
            seconds = server.wait_ready(options.start_seconds)
            samples = server.scrape()
            if options.gate:
                self._progress.doing(f"{cell.name}: checking greedy tokens")
                current.wrong = self._check(cell, server)
        except (ServerFailed, gate.GateFailed) as error:
            self._failures[name] = str(error)
            raise
        if not cell.start:
            cell.start = {"ready": seconds} | _labelled(samples, "startup_phase_seconds")
            cell.memory = _labelled(samples, "memory_bytes")
        return current

    def _time_steps(self, cell: Cell) -> None:
        """Time the step of every bucket, once for each configuration, device and commit, and keep that in steps.json.

        A failure is noted there and in the report; the loads are measured all the same.
        """
        options = cell.options
        known = self._store.noted("steps.json") or {}
        timing = known.get(cell.identity)
        same = {"commit": self._environment["commit"], "device": self._environment["device"]}
        same |= {"workload": cell.about["workload"]}
        if timing and not options.fresh and same["commit"] and same.items() <= timing.items():
            return
        lengths = map(str, Workload(options, cell.config).lengths())
        command = [sys.executable, "-m", "sweep.steps", *lengths, *cell.overrides]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=options.start_seconds,
                preexec_fn=dying_with_parent(),
            )
            timing = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            reason = None if timing else (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            timing, reason = None, str(error)
        known[cell.identity] = (timing or {"reason": reason}) | same | {"configuration": cell.name}
        self._store.note("steps.json", known)

    def _check(self, cell: Cell, server: Server) -> str | None:
        """The gate's verdict; the first configuration of a model that answers is the baseline. Raises GateFailed."""
        model, options = cell.config.model, cell.options
        vocab, context = Workload(options, cell.config).vocab, cell.config.buckets.max_context
        answers = gate.answers(
            server.url, model.name, gate.prompts(vocab, min(context, 1024)), options.gate_tokens, options.stall_seconds
        )
        known = {} if options.fresh and not self._rows else self._store.noted("baseline.json") or {}
        key = key_of(asdict(model), options.gate_tokens, self._environment["commit"], self._environment["device"])
        if key not in known:
            known[key] = {
                "configuration": cell.name,
                "identity": cell.identity,
                "answers": [asdict(answer) for answer in answers],
            }
            self._store.note("baseline.json", known)
            return None
        return gate.difference([gate.Greedy(**answer) for answer in known[key]["answers"]], answers, options.gate_tie)

    async def _load(self, cell: Cell, server: Server) -> load.Run:
        """A warm-up, and one repeat. Raises CellFailed, ServerFailed."""
        options, work, repeat = cell.options, Workload(cell.options, cell.config), len(cell.runs) + 1
        is_closed = cell.load.mode == "closed"
        users = int(cell.load.level) if is_closed else 1
        stream = users if is_closed else 10**6 + int(1000 * cell.load.level)

        async def closed(send: load.Send, each: int, number: int, name: str) -> load.Run:
            requests, on_done = work.requests(users * each, stream, number), self._counter(cell, name)
            stall = options.stall_seconds
            run = await load.closed(send, requests, users, options.seconds, stall, on_done, cell.stagger)
            _require_answers(server, run, cell, name)
            cell.spread_starts(run)
            return run

        async with http_sender(server.url, cell.config.model.name, options.temperature) as send:
            if options.warmup:
                await closed(send, options.warmup, 0, "warm-up")
            planned = options.repeats if repeat <= options.repeats else options.max_repeats
            name = f"repeat {repeat} of {planned}"
            if is_closed:
                return await closed(send, options.requests + 1, repeat, name)
            arrivals = work.arrivals(cell.load.level, stream, repeat)
            requests, on_done = work.requests(len(arrivals), stream, repeat), self._counter(cell, name)
            run = await load.opened(send, requests, arrivals, options.stall_seconds, on_done)
            _require_answers(server, run, cell, name)
            return run

    def _counter(self, cell: Cell, name: str) -> load.OnDone:
        """Shows how many requests are answered."""
        shown, done = f"{cell.name} · {cell.load}: {name}", 0
        self._progress.doing(shown)

        def on_done(record: load.Record) -> None:
            nonlocal done
            done += 1
            self._progress.doing(f"{shown}, {done} requests answered")

        return on_done

    def _release(self) -> None:
        """Stop the server."""
        if self._current:
            self._current.server.stop()
            self._current = None


def _require_answers(server: Server, run: load.Run, cell: Cell, name: str) -> None:
    """Raises ServerFailed if the server has ended, CellFailed if it hangs."""
    server.check()
    if any(record.error and record.error.startswith("nothing came") for record in run.records):
        raise CellFailed(f"the server hangs: nothing came for {cell.options.stall_seconds:g} s in the {name}")


def _require_usable(options: SweepConfig) -> None:
    """Refuse what no configuration could answer, before a server starts. Raises ConfigError."""
    allowed = [*measure.names(), *SCRAPED]
    if options.objective.removeprefix("-") not in allowed:
        raise ConfigError(f"sweep.objective: got {options.objective!r}, allowed: {', '.join(allowed)}")
    if options.prompts:
        workload.read(options.prompts)


def _measured_with(options: SweepConfig) -> dict[str, Any]:
    """The settings, beside the workload, that a row's figures depend on."""
    names = ("repeats", "max_repeats", "requests", "seconds", "warmup", "gate", "gate_tokens", "gate_tie")
    return {name: getattr(options, name) for name in names} | asdict(options.limits)


def _labelled(samples: Samples, name: str) -> dict[str, float]:
    return {labels[0]: value for (metric, *labels), value in samples.items() if metric == name}
