"""The sweep: one server for each configuration, one row for each load. A failure costs only its own rows.

Hydra calls `run` once for each job, with the loads of one server after each other; the server is kept for the next job
if that has the same configuration.
"""

import asyncio
import json
import math
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from conf import schema
from conf.schema import Config, ConfigError, Device
from sweep import gate, load, measure, settings, workload
from sweep.client import http_sender
from sweep.command import identity, overrides
from sweep.environment import environment
from sweep.progress import Progress
from sweep.report import write_report
from sweep.server import ROOT, Samples, Server, ServerFailed
from sweep.settings import SweepConfig
from sweep.store import Row, Store, key_of
from sweep.workload import Workload

SCRAPED = ("prefix_hit_share", "preemptions")  # figures from the server's metrics, beside those of `measure`
START_GUESS = 30  # seconds that a start takes, for the plan's estimate


@dataclass(frozen=True)
class Load:
    """One point of the load axis."""

    mode: str  # closed | open
    level: float  # users, or requests a second

    def __str__(self) -> str:
        if self.mode == "open":
            return f"{self.level:g} requests/s"
        return f"{self.level:g} user{'s' * (self.level != 1)}"


@dataclass
class Configured:
    """One server configuration and what is known about its server."""

    config: Config
    overrides: list[str]
    identity: str
    server: Server | None = None
    failure: str | None = None  # why it did not start; it is not tried again for its other loads
    wrong: str | None = None  # the difference that the correctness gate found
    start: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class CellFailed(RuntimeError):
    """A load without figures; the message becomes the row's reason."""


class Sweep:
    """A context manager; its end, also by an exception, stops the server and writes the report over the rows so far."""

    def __init__(self, console: Console, command: tuple[str, ...]) -> None:
        """`command` starts a server; overrides are appended to it."""
        self._console = console
        self._command = command
        self._progress = Progress(console)
        self._current: Configured | None = None
        self._opened: Store | None = None  # by the first job
        self._options: SweepConfig | None = None  # of the first job
        self._rows: dict[str, Row] = {}  # by key: a sweeper may run the same job twice
        self._planned: list[dict[str, Any]] = []
        self._environment: dict[str, Any] = {}

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second signal must not leave a server behind
            signal.signal(number, signal.SIG_IGN)
        self._progress.__exit__()
        self._release()
        if self._planned:
            self._print_plan()
        if self._options and self._rows:
            write_report(self._store, list(self._rows.values()), self._options, self._environment, self._console)

    @property
    def _store(self) -> Store:
        assert self._opened is not None, "the first job opens it"
        return self._opened

    def run(self, composed: Any) -> float:
        """Run one Hydra job; returns the worst objective of its loads. Raises ConfigError for invalid `sweep` keys."""
        options = settings.load(composed)
        _require_usable(options)
        if self._options is None:
            self._begin(options, composed)
        loads = [Load("closed", n) for n in options.concurrency] + [Load("open", rate) for rate in options.rate]
        plain = OmegaConf.create({key: value for key, value in composed.items() if key != "sweep"})
        try:
            config = schema.load(plain)
            Workload(options, config)  # lengths that its context cannot hold are refused before its server starts
        except ConfigError as error:
            name = " ".join(o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith("sweep"))
            return max([self._refused(name or "defaults", str(load), str(error), options) for load in loads])
        words = overrides(config, dict(HydraConfig.get().runtime.choices))
        if options.dry_run:
            self._plan(config, words, loads, options)
            return 0.0
        return max([self._row(config, words, load, options) for load in loads])

    def _begin(self, options: SweepConfig, composed: Any) -> None:
        self._options, self._environment = options, environment(ROOT)
        self._opened = Store(Path(options.folder))
        if options.dry_run:
            return
        self._progress.__enter__()
        resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        self._store.note("environment.json", self._environment | {"configuration": resolved})

    def _row(self, config: Config, words: list[str], load: Load, options: SweepConfig) -> float:
        """Measure one load unless an earlier run has, write its row, and return its objective."""
        row: Row = {
            "key": self._key(config, load, options),
            "identity": identity(config),
            "configuration": " ".join(words) or "defaults",
            "overrides": words,
            "load": str(load),
            **asdict(load),
            "commit": self._environment["commit"],
            "device": self._environment["device"],
            "gpus": self._gpus(config),
            "on_gpu": self._on_gpu(config),
            "buckets_config": asdict(config.buckets),
        }
        known = self._finished(row["key"], options)
        if known:
            row = known
        else:
            row["at"] = datetime.now(UTC).isoformat(timespec="seconds")
            try:
                configured, server = self._server_for(config, words, options)
                row |= self._measure(configured, server, load, options)
                row |= {"start": configured.start, "memory": configured.memory}
                fails, undecided = measure.judge(row["figures"], row["intervals"], options.limits)
                found = {
                    "wrong": configured.wrong,
                    "overloaded": measure.overloaded(row["figures"]),
                    "limits": "; ".join(fails),
                    "undecided": "; ".join(undecided),
                }
                status, reason = next(((name, why) for name, why in found.items() if why), ("ok", None))
                row |= {"status": status, "reason": reason}
            except (CellFailed, ServerFailed, gate.GateFailed, ConfigError) as error:
                row |= {"status": "failed", "reason": str(error)}
                self._release()
            self._store.add(row)
        self._rows[row["key"]] = row
        self._progress.add(row, bool(known))
        return self._objective(row, options)

    def _key(self, config: Config, load: Load, options: SweepConfig) -> str:
        """A hash, equal for the same measurement of the same code on the same device."""
        where = self._environment["commit"], self._environment["device"]
        return key_of(identity(config), asdict(load), _measured_with(options), where)

    def _finished(self, key: str, options: SweepConfig) -> Row | None:
        """The row of an earlier run. None without a commit: then nothing tells whether the code is the same."""
        return self._store.finished(key) if self._environment["commit"] and not options.fresh else None

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
        if not options.dry_run:
            self._store.add(row)
            self._rows[row["key"]] = row
            self._progress.add(row, False)
        else:
            self._planned.append({"configuration": name, "load": load, "seconds": 0, "misfit": reason})
        return math.inf

    @staticmethod
    def _objective(row: Row, options: SweepConfig) -> float:
        if row["status"] not in ("ok", "undecided"):
            return math.inf
        figures = {name: math.nan if value is None else value for name, value in row["figures"].items()}
        return measure.objective(figures, options.objective)

    def _gpus(self, config: Config) -> int:
        """GPUs that a server of this configuration uses; a machine without GPUs counts as one."""
        return config.tp if self._on_gpu(config) else 1

    def _on_gpu(self, config: Config) -> bool:
        return bool(self._environment["gpus"]) and config.kernels.device is not Device.cpu

    def _server_for(self, config: Config, words: list[str], options: SweepConfig) -> tuple[Configured, Server]:
        """The running server if it has this configuration, or else a new one: steps timed, started and checked.

        Raises CellFailed, ServerFailed, GateFailed.
        """
        name = identity(config)
        current = self._current
        if current and current.identity == name:
            if current.failure:
                raise CellFailed(current.failure)
            if current.server:
                return current, current.server
        self._release()
        current = self._current = Configured(config, words, name)
        shown = " ".join(words) or "defaults"
        if options.steps:
            self._progress.doing(f"{shown}: timing every bucket's step")
            self._time_steps(current, options)
        self._progress.doing(f"{shown}: starting the server")
        server = current.server = Server(self._command, words, self._store.folder / "logs" / f"{name}.log")
        try:
            seconds = server.wait_ready(options.start_seconds)
            samples = server.scrape()
            if options.gate:
                self._progress.doing(f"{shown}: checking greedy tokens")
                current.wrong = self._check(current, server, options)
        except (ServerFailed, gate.GateFailed) as error:
            current.failure = str(error)
            raise
        current.start = {"ready": seconds} | _labelled(samples, "startup_phase_seconds")
        current.memory = _labelled(samples, "memory_bytes")
        return current, server

    def _time_steps(self, current: Configured, options: SweepConfig) -> None:
        """Time the step of every bucket, once for each configuration, device and commit, and keep that in steps.json.

        A failure is noted there and in the report; the loads are measured all the same.
        """
        known = self._store.noted("steps.json") or {}
        timing = known.get(current.identity)
        same = {"commit": self._environment["commit"], "device": self._environment["device"]}
        if timing and not options.fresh and same["commit"] and same.items() <= timing.items():
            return
        command = [sys.executable, "-m", "sweep.steps", str(options.steps_context), *current.overrides]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=options.start_seconds)
            timing = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            reason = None if timing else (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            timing, reason = None, str(error)
        known[current.identity] = (
            (timing or {"reason": reason}) | same | {"configuration": " ".join(current.overrides) or "defaults"}
        )
        self._store.note("steps.json", known)

    def _check(self, current: Configured, server: Server, options: SweepConfig) -> str | None:
        """The gate's verdict; the first configuration of a model that answers is the baseline. Raises GateFailed."""
        model = current.config.model
        vocab, context = Workload(options, current.config).vocab, current.config.buckets.max_context
        answers = gate.answers(
            server.url, model.name, gate.prompts(vocab, min(context, 1024)), options.gate_tokens, options.stall_seconds
        )
        known = {} if options.fresh and not self._rows else self._store.noted("baseline.json") or {}
        key = key_of(asdict(model), options.gate_tokens, self._environment["commit"], self._environment["device"])
        if key not in known:
            known[key] = {
                "configuration": " ".join(current.overrides) or "defaults",
                "identity": current.identity,
                "answers": [asdict(answer) for answer in answers],
            }
            self._store.note("baseline.json", known)
            return None
        return gate.difference([gate.Greedy(**answer) for answer in known[key]["answers"]], answers, options.gate_tie)

    def _measure(self, current: Configured, server: Server, load_: Load, options: SweepConfig) -> Row:
        """Warm-up, then the repeats, as keys of a row. Raises CellFailed, ServerFailed."""
        work = Workload(options, current.config)
        before = server.scrape()
        runs = asyncio.run(self._load(current, server, work, load_, options))
        after = server.scrape()
        records = [record for run in runs for record in run.records]
        errors = [record.error for record in records if record.error]
        if not records:
            raise CellFailed(f"no request was due within {options.seconds:g} s")
        if len(errors) == len(records):
            raise CellFailed(f"no request succeeded: {errors[0]}")
        if load_.mode == "closed" and all(record.first for record in records):
            raise CellFailed(f"no user sent a second request within {options.seconds:g} s")
        means, intervals = measure.figures(runs, options.limits, self._gpus(current.config))
        increase = {name: value - before.get(name, 0.0) for name, value in after.items()}
        queries = increase.get(("prefix_cache_queries_total",), 0.0)
        hits = increase.get(("prefix_cache_hits_total",), 0.0)
        scraped = hits / queries if queries else 0.0, increase.get(("num_preemptions_total",), 0.0)
        means |= dict(zip(SCRAPED, scraped, strict=True))
        return {
            "figures": means,
            "intervals": intervals,
            "buckets": _buckets(increase),
            "error": max(set(errors), key=errors.count) if errors else None,
        }

    async def _load(
        self, current: Configured, server: Server, work: Workload, load_: Load, options: SweepConfig
    ) -> list[load.Run]:
        users = int(load_.level) if load_.mode == "closed" else 1
        stream = users if load_.mode == "closed" else 10**6 + int(1000 * load_.level)
        shown = f"{' '.join(current.overrides) or 'defaults'} · {load_}"
        runs: list[load.Run] = []
        stagger = 0.0
        model = current.config.model.name
        async with http_sender(server.url, model, options.temperature) as send:
            for repeat in range(-1 if options.warmup else 0, options.max_repeats):
                if repeat >= options.repeats and not _undecided(runs, options):
                    break
                planned = options.repeats if repeat < options.repeats else options.max_repeats
                done, name = 0, f"repeat {repeat + 1} of {planned}" if repeat >= 0 else "warm-up"
                self._progress.doing(f"{shown}: {name}")

                def on_done(record: load.Record, name: str = name) -> None:
                    nonlocal done
                    done += 1
                    self._progress.doing(f"{shown}: {name}, {done} requests answered")

                each = options.requests + 1 if repeat >= 0 else options.warmup
                if load_.mode == "closed" or repeat < 0:
                    requests = work.requests(users * each, stream, repeat + 1)
                    run = await load.closed(
                        send, requests, users, options.seconds, options.stall_seconds, on_done, stagger
                    )
                    if lengths := [measure.e2e(record) for record in run.records if not record.error]:
                        spread = min(1e-3 * statistics.median(lengths), options.seconds / 2)
                        stagger = spread / users
                else:
                    arrivals = work.arrivals(load_.level, stream, repeat + 1)
                    requests = work.requests(len(arrivals), stream, repeat + 1)
                    run = await load.opened(send, requests, arrivals, options.stall_seconds, on_done)
                server.check()
                if any(record.error and record.error.startswith("nothing came") for record in run.records):
                    raise CellFailed(f"the server hangs: nothing came for {options.stall_seconds:g} s in the {name}")
                if repeat >= 0:
                    runs.append(run)
        return runs

    def _release(self) -> None:
        """Stop the server. What is known about its configuration is kept until another one comes."""
        if self._current and self._current.server:
            self._current.server.stop()
            self._current.server = None

    def _plan(self, config: Config, words: list[str], loads: list[Load], options: SweepConfig) -> None:
        from sweep.fit import misfit  # here, because only a plan needs torch

        why, name = misfit(config, self._environment["gpus"]), " ".join(words) or "defaults"
        for load_ in loads:
            known = self._finished(self._key(config, load_, options), options) is not None
            started = any(row["seconds"] and row["configuration"] == name for row in self._planned)
            repeats = options.max_repeats if measure.limited(options.limits) else options.repeats
            seconds = (repeats + (options.warmup > 0)) * options.seconds
            seconds += 0 if started else START_GUESS * (1 + options.steps)
            self._planned.append(
                {
                    "configuration": name,
                    "load": str(load_),
                    "misfit": why,
                    "known": known,
                    "seconds": 0 if why or known else seconds,
                }
            )

    def _print_plan(self) -> None:
        total = sum(row["seconds"] for row in self._planned)
        self._console.print(f"{len(self._planned)} rows, at most about {total / 60:.1f} minutes, in this order:")
        for number, row in enumerate(self._planned, 1):
            why = f"  [red]does not fit: {escape(row['misfit'])}[/]" if row["misfit"] else f"  {row['seconds']:.0f} s"
            why = "  measured before" if row.get("known") else why
            self._console.print(
                f"{number:>4}  {escape(row['configuration'])} · {row['load']}{why}", highlight=False, soft_wrap=True
            )


def _require_usable(options: SweepConfig) -> None:
    """Refuse what no configuration could answer, before a server starts. Raises ConfigError."""
    allowed = [*measure.names(), *SCRAPED]
    if options.objective.removeprefix("-") not in allowed:
        raise ConfigError(f"sweep.objective: got {options.objective!r}, allowed: {', '.join(allowed)}")
    if options.prompts:
        workload.read(options.prompts)


def _measured_with(options: SweepConfig) -> dict[str, Any]:
    """The settings that a row's figures depend on."""
    names = (
        "prompt_tokens",
        "output_tokens",
        "prompt_sigma",
        "output_sigma",
        "prompts",
        "temperature",
        "seed",
        "repeats",
        "max_repeats",
        "requests",
        "seconds",
        "warmup",
        "gate",
        "gate_tokens",
        "gate_tie",
    )
    return {name: getattr(options, name) for name in names} | asdict(options.limits)


def _undecided(runs: list[load.Run], options: SweepConfig) -> bool:
    """Whether more repeats may tell if these break a limit: none is known to be broken, and one cannot be told."""
    fails, undecided = measure.judge(*measure.figures(runs, options.limits, gpus=1), options.limits)
    return bool(undecided and not fails)


def _labelled(samples: Samples, name: str) -> dict[str, float]:
    return {labels[0]: value for (metric, *labels), value in samples.items() if metric == name}


def _buckets(increase: Samples) -> list[dict[str, Any]]:
    """Steps and rows of each bucket while the load ran."""
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for (name, *labels), value in increase.items():
        if name in ("bucket_steps_total", "bucket_rows_used_total", "bucket_rows_padded_total"):
            kind, size = labels
            counts.setdefault((kind, int(size)), {})[name.removeprefix("bucket_").removesuffix("_total")] = int(value)
    return [{"kind": kind, "size": size} | bucket for (kind, size), bucket in counts.items()]
