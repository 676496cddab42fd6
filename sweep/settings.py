"""What a sweep is told: the typed `sweep` group of the configuration and its checks.

Times are milliseconds where they are latencies and seconds where they are budgets; the names say which.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Composed, ConfigError


@dataclass
class Limits:
    """A request that breaks one is not goodput; a load whose 99th percentile breaks one has an infinite objective."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    error_share: float = 0.0  # of a load's requests


@dataclass
class SweepConfig:
    name: str = "sweep"
    folder: str = "sweeps/${sweep.name}"
    concurrency: Any = field(default_factory=lambda: [1, 4])  # closed loop: users that each wait for their answer
    rate: Any = field(default_factory=list)  # open loop: requests a second, Poisson
    prompt_tokens: int = 256  # the median where lengths are drawn
    output_tokens: int = 64
    prompt_sigma: float = 0.0  # lognormal spread of the lengths; 0: fixed
    output_sigma: float = 0.0
    prompts: str | None = None  # JSONL of {"prompt": text or token ids, "output_tokens": optional}, in place of draws
    temperature: float = 1.0
    seed: int = 0
    repeats: int = 3
    requests: int = 8  # by user and repeat, at most, in a closed loop
    seconds: float = 20.0  # budget of a repeat: no request is begun after it
    warmup: int = 1  # requests by user before the first repeat, not counted
    start_seconds: float = 600.0  # until a server must be ready
    stall_seconds: float = 60.0  # a request that brings nothing for so long has failed
    limits: Limits = field(default_factory=Limits)
    objective: str = "tpot_p99_ms"  # a column of results.csv; with a minus in front, higher is better
    gate: bool = True  # greedy tokens must equal the first configuration's, up to ties
    gate_tokens: int = 16
    gate_tie: float = 0.125  # log probability by which two tokens may differ and still be a tie: a bfloat16 step
    steps: bool = True  # time every bucket's step, in a process of its own before the server starts
    steps_context: int = 1024  # tokens before each row of a timed decode step, where the context allows
    dry_run: bool = False  # print what would run, how long it takes and what does not fit
    fresh: bool = False  # measure again what has been measured
    compare: str | None = None  # folder of an older sweep


@dataclass
class SweepRun(Composed):
    """serve.py's configuration and the sweep's."""

    sweep: SweepConfig = field(default_factory=SweepConfig)


def register() -> None:
    """In place of serve.py's own base, so that conf/config.yaml builds on it as it is."""
    ConfigStore.instance().store("schema", SweepRun)


def load(composed: Any) -> SweepConfig:
    """The `sweep` group of a composed configuration, checked. Raises ConfigError with one line."""
    try:
        settings: SweepConfig = OmegaConf.to_object(composed).sweep
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'sweep'}: {str(error).splitlines()[0]}") from error
    settings.concurrency = _numbers("concurrency", settings.concurrency, int)
    settings.rate = _numbers("rate", settings.rate, float)

    def require(holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"sweep.{key}: got {getattr(settings, key)!r}, allowed: {allowed}")

    require(bool(settings.concurrency or settings.rate), "concurrency", "a number or a list, unless there are rates")
    for key in (
        "prompt_tokens",
        "output_tokens",
        "repeats",
        "requests",
        "seconds",
        "start_seconds",
        "stall_seconds",
        "gate_tokens",
        "steps_context",
    ):
        require(getattr(settings, key) > 0, key, "more than 0")
    for key in ("prompt_sigma", "output_sigma", "warmup", "gate_tie"):
        require(getattr(settings, key) >= 0, key, "0 or more")
    return settings


def _numbers(key: str, given: Any, kind: type) -> list:
    """One number or several -> a list of positive ones."""
    listed = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 and kind(n) == n for n in listed):
        raise ConfigError(f"sweep.{key}: got {given!r}, allowed: positive numbers, one or a list")
    return [kind(n) for n in listed]
