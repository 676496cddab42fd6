"""The sweep: one server a configuration, one row a load, and nothing that goes wrong costs more than its row.

Hydra calls `run` once a job, in an order in which the loads of a server follow each other; the server stays for the
next job if its configuration is the same.
"""

import asyncio
import json
import math
import signal
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
from sweep import gate, load, measure, settings
from sweep.client import http_sender
from sweep.command import identity, overrides
from sweep.environment import environment
from sweep.progress import Progress
from sweep.report import write_report
from sweep.server import ROOT, Samples, Server, ServerFailed
from sweep.settings import SweepConfig
from sweep.store import Row, Store, key_of
from sweep.workload import Workload

START_GUESS = 30  # seconds, for the estimate


@dataclass(frozen=True)
class Load:
    mode: str  # closed | open
    level: float  # users, or requests a second

    def __str__(self) -> str:
        if self.mode == "open":
            return f"{self.level:g} requests/s"
        return f"{self.level:g} user{'s' * (self.level != 1)}"


@dataclass
class Configured:
    """One server configuration and what is known of its server."""

    config: Config
    overrides: list[str]
    identity: str
    server: Server | None = None
    failure: str | None = None  # why it does not start: not tried again for its other loads
    wrong: str | None = None  # what the gate says
    start: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class CellFailed(RuntimeError):
    """A row without figures; the message is its reason."""


class Sweep:
    """Use as a context: leaving it, in whatever way, stops the server and writes the report over what there is."""

    def __init__(self, console: Console, command: tuple[str, ...]) -> None:
        """`command` starts a server, given overrides."""
        self._console = console
        self._command = command
        self._progress = Progress(console)
        self._current: Configured | None = None
        self._store: Store | None = None
        self._settings: SweepConfig | None = None
        self._rows: dict[str, Row] = {}  # by key: a sweeper may ask for the same twice
        self._planned: list[dict[str, Any]] = []
        self._environment: dict[str, Any] = {}

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not leave a server behind
            signal.signal(number, signal.SIG_IGN)
        self._progress.__exit__()
        self._release()
        if self._planned:
            self._print_plan()
        if self._store and self._rows:
            write_report(self._store, list(self._rows.values()), self._settings, self._environment, self._console)

    def run(self, composed: Any) -> float:
        """One Hydra job: the objective, the worst of its loads. Raises ConfigError for a sweep that makes no sense."""
        asked = settings.load(composed)
        if self._settings is None:
            self._begin(asked, composed)
        loads = [Load("closed", n) for n in asked.concurrency] + [Load("open", rate) for rate in asked.rate]
        plain = OmegaConf.create({key: value for key, value in composed.items() if key != "sweep"})
        try:
            config = schema.load(plain)
        except ConfigError as error:
            words = " ".join(o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith("sweep"))
            return max([self._refused(words or "defaults", str(load), str(error), asked) for load in loads])
        made = overrides(config, dict(HydraConfig.get().runtime.choices))
        if asked.dry_run:
            self._plan(config, made, loads, asked)
            return 0.0
        return max([self._row(config, made, load, asked) for load in loads])

    def _begin(self, asked: SweepConfig, composed: Any) -> None:
        self._settings, self._environment = asked, environment(ROOT)
        self._store = Store(Path(asked.folder))
        if asked.dry_run:
            return
        self._progress.__enter__()
        resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        self._store.note("environment.json", self._environment | {"configuration": resolved})

    def _row(self, config: Config, made: list[str], load: Load, asked: SweepConfig) -> float:
        """Measure one load, or find that it has been; write its row; the objective."""
        name = identity(config)
        row: Row = {
            "key": self._key(config, load, asked),
            "identity": name,
            "configuration": " ".join(made) or "defaults",
            "overrides": made,
            "load": str(load),
            **asdict(load),
            "commit": self._environment["commit"],
            "device": self._environment["device"],
            "gpus": self._gpus(config),
            "on_gpu": self._on_gpu(config),
            "buckets_config": asdict(config.buckets),
        }
        known = self._finished(row["key"], asked)
        if known:
            row = known
        else:
            row["at"] = datetime.now(UTC).isoformat(timespec="seconds")
            try:
                configured = self._server_for(config, made, asked)
                row |= self._measure(configured, load, asked)
                row |= {"start": configured.start, "memory": configured.memory}
                said = configured.wrong or "; ".join(measure.broken(row["figures"], asked.limits)) or None
                row |= {"status": "wrong" if configured.wrong else "limits" if said else "ok", "reason": said}
            except (CellFailed, ServerFailed, gate.GateFailed, ConfigError) as error:
                row |= {"status": "failed", "reason": str(error)}
                self._release()
            self._store.add(row)
        self._rows[row["key"]] = row
        self._progress.add(row, bool(known))
        return self._objective(row, asked)

    def _key(self, config: Config, load: Load, asked: SweepConfig) -> str:
        """The same for the same measurement of the same code on the same device."""
        where = self._environment["commit"], self._environment["device"]
        return key_of(identity(config), asdict(load), _measured_with(asked), where)

    def _finished(self, key: str, asked: SweepConfig) -> Row | None:
        """Without a commit nobody knows whether the code is the same."""
        return self._store.finished(key) if self._environment["commit"] and not asked.fresh else None

    def _refused(self, words: str, load: str, reason: str, asked: SweepConfig) -> float:
        row = {
            "key": key_of(words, load),
            "identity": words,
            "configuration": words,
            "overrides": words.split(),
            "load": load,
            "status": "failed",
            "reason": reason,
        }
        if not asked.dry_run:
            self._store.add(row)
            self._rows[row["key"]] = row
            self._progress.add(row, False)
        else:
            self._planned.append({"configuration": words, "load": load, "seconds": 0, "misfit": reason})
        return math.inf

    @staticmethod
    def _objective(row: Row, asked: SweepConfig) -> float:
        if row["status"] in ("failed", "wrong"):
            return math.inf
        figures = {name: math.nan if value is None else value for name, value in row["figures"].items()}
        try:
            return measure.objective(figures, asked.objective, asked.limits)
        except KeyError as error:
            raise ConfigError(f"sweep.objective: got {asked.objective!r}, allowed: {', '.join(figures)}") from error

    def _gpus(self, config: Config) -> int:
        """GPUs that a server of this configuration takes; on a CPU the machine counts as one."""
        return config.tp if self._on_gpu(config) else 1

    def _on_gpu(self, config: Config) -> bool:
        return bool(self._environment["gpus"]) and config.kernels.device is not Device.cpu

    def _server_for(self, config: Config, made: list[str], asked: SweepConfig) -> Configured:
        """The running server if it is of this configuration, or a new one: timed, started and checked."""
        name = identity(config)
        current = self._current
        if current and current.identity == name:
            if current.failure:
                raise CellFailed(current.failure)
            if current.server:
                return current
        self._release()
        current = self._current = Configured(config, made, name)
        shown = " ".join(made) or "defaults"
        if asked.steps:
            self._progress.doing(f"{shown}: timing every bucket's step")
            self._time_steps(current, asked)
        self._progress.doing(f"{shown}: starting the server")
        current.server = Server(self._command, made, self._store.folder / "logs" / f"{name}.log")
        try:
            seconds = current.server.wait_ready(asked.start_seconds)
            samples = current.server.scrape()
            if asked.gate:
                self._progress.doing(f"{shown}: checking greedy tokens")
                current.wrong = self._check(current, asked)
        except (ServerFailed, gate.GateFailed) as error:
            current.failure = str(error)
            raise
        current.start = {"ready": seconds} | _labelled(samples, "startup_phase_seconds")
        current.memory = _labelled(samples, "memory_bytes")
        return current

    def _time_steps(self, current: Configured, asked: SweepConfig) -> None:
        """Once a configuration, device and commit; kept in steps.json. A failure there is told, and costs nothing."""
        known = self._store.noted("steps.json") or {}
        found = known.get(current.identity)
        same = {"commit": self._environment["commit"], "device": self._environment["device"]}
        if found and not asked.fresh and same["commit"] and same.items() <= found.items():
            return
        command = [sys.executable, "-m", "sweep.steps", str(asked.steps_context), *current.overrides]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=asked.start_seconds)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            reason = None if found else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            found, reason = None, str(error)
        known[current.identity] = (
            (found or {"reason": reason}) | same | {"configuration": " ".join(current.overrides) or "defaults"}
        )
        self._store.note("steps.json", known)

    def _check(self, current: Configured, asked: SweepConfig) -> str | None:
        """The gate's verdict; the first configuration of a model that answers is the baseline."""
        model = current.config.model
        vocab, context = Workload(asked, current.config).vocab, current.config.buckets.max_context
        found = gate.answers(
            current.server.url,
            model.name,
            gate.prompts(vocab, min(context, 1024)),
            asked.gate_tokens,
            asked.stall_seconds,
        )
        known = {} if asked.fresh and not self._rows else self._store.noted("baseline.json") or {}
        key = key_of(asdict(model), asked.gate_tokens, self._environment["commit"], self._environment["device"])
        if key not in known:
            known[key] = {
                "configuration": " ".join(current.overrides) or "defaults",
                "identity": current.identity,
                "answers": [asdict(answer) for answer in found],
            }
            self._store.note("baseline.json", known)
            return None
        return gate.difference([gate.Greedy(**answer) for answer in known[key]["answers"]], found, asked.gate_tie)

    def _measure(self, current: Configured, load_: Load, asked: SweepConfig) -> Row:
        """Warm-up, then the repeats. Raises CellFailed, ServerFailed."""
        work = Workload(asked, current.config)
        before = current.server.scrape()
        runs = asyncio.run(self._load(current, work, load_, asked))
        after = current.server.scrape()
        records = [record for run in runs for record in run.records]
        errors = [record.error for record in records if record.error]
        if len(errors) == len(records):
            raise CellFailed(f"no request succeeded: {errors[0]}")
        means, intervals = measure.over_repeats(
            [measure.figures(run, asked.limits, self._gpus(current.config)) for run in runs]
        )
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        looked_up = grown.get(("prefix_cache_queries_total",), 0.0)
        means["prefix_hit_share"] = grown.get(("prefix_cache_hits_total",), 0.0) / looked_up if looked_up else 0.0
        means["preemptions"] = grown.get(("num_preemptions_total",), 0.0)
        return {
            "figures": means,
            "intervals": intervals,
            "buckets": _buckets(grown),
            "error": max(set(errors), key=errors.count) if errors else None,
        }

    async def _load(self, current: Configured, work: Workload, load_: Load, asked: SweepConfig) -> list[load.Run]:
        users = int(load_.level) if load_.mode == "closed" else 1
        stream = users if load_.mode == "closed" else 10**6 + int(1000 * load_.level)
        shown = f"{' '.join(current.overrides) or 'defaults'} · {load_}"
        runs: list[load.Run] = []
        model = current.config.model.name
        async with http_sender(current.server.url, model, asked.temperature) as send:
            for repeat in range(-1 if asked.warmup else 0, asked.repeats):
                done, name = 0, f"repeat {repeat + 1} of {asked.repeats}" if repeat >= 0 else "warm-up"
                self._progress.doing(f"{shown}: {name}")

                def on_done(record: load.Record, name: str = name) -> None:
                    nonlocal done
                    done += 1
                    self._progress.doing(f"{shown}: {name}, {done} requests answered")

                each = asked.requests if repeat >= 0 else asked.warmup
                if load_.mode == "closed" or repeat < 0:
                    requests = work.requests(users * each, stream, repeat + 1)
                    run = await load.closed(send, requests, users, asked.seconds, asked.stall_seconds, on_done)
                else:
                    arrivals = work.arrivals(load_.level, stream, repeat + 1)
                    requests = work.requests(len(arrivals), stream, repeat + 1)
                    run = await load.opened(send, requests, arrivals, asked.stall_seconds, on_done)
                current.server.check()
                if any(record.error and record.error.startswith("nothing came") for record in run.records):
                    raise CellFailed(f"the server hangs: nothing came for {asked.stall_seconds:g} s in the {name}")
                if repeat >= 0:
                    runs.append(run)
        return runs

    def _release(self) -> None:
        """Stop the server. What is known of its configuration stays until another comes."""
        if self._current and self._current.server:
            self._current.server.stop()
            self._current.server = None

    def _plan(self, config: Config, made: list[str], loads: list[Load], asked: SweepConfig) -> None:
        from sweep.fit import misfit  # here, because only a plan pays for torch

        why, words = misfit(config, self._environment["gpus"]), " ".join(made) or "defaults"
        for load_ in loads:
            known = self._finished(self._key(config, load_, asked), asked) is not None
            started = any(row["seconds"] and row["configuration"] == words for row in self._planned)
            seconds = (asked.repeats + (asked.warmup > 0)) * asked.seconds
            seconds += 0 if started else START_GUESS * (1 + asked.steps)
            self._planned.append(
                {
                    "configuration": words,
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


def _measured_with(asked: SweepConfig) -> dict[str, Any]:
    """The settings on which a row's figures depend."""
    names = (
        "prompt_tokens",
        "output_tokens",
        "prompt_sigma",
        "output_sigma",
        "prompts",
        "temperature",
        "seed",
        "repeats",
        "requests",
        "seconds",
        "warmup",
        "gate",
        "gate_tokens",
        "gate_tie",
    )
    return {name: getattr(asked, name) for name in names} | asdict(asked.limits)


def _labelled(samples: Samples, name: str) -> dict[str, float]:
    return {labels[0]: value for (found, *labels), value in samples.items() if found == name}


def _buckets(grown: Samples) -> list[dict[str, Any]]:
    """Steps and rows by bucket while the load ran."""
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for (name, *labels), value in grown.items():
        if name in ("bucket_steps_total", "bucket_rows_used_total", "bucket_rows_padded_total"):
            kind, size = labels
            counts.setdefault((kind, int(size)), {})[name.removeprefix("bucket_").removesuffix("_total")] = int(value)
    return [{"kind": kind, "size": size} | found for (kind, size), found in counts.items()]
