"""The typed `sweep` group of the configuration and its checks.

Latencies are in milliseconds and time budgets in seconds; the names say which.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Composed, ConfigError


@dataclass
class Limits:
    """Latency limits. A request over one is not goodput; the objective of a load whose p99 is over one is infinite."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    error_share: float = 0.0  # of a load's requests


@dataclass
class SweepConfig:
    """What to measure and how; a sweep's axes are overrides of these and of serve.py's keys."""

    name: str = "sweep"
    folder: str = "sweeps/${sweep.name}"
    concurrency: Any = None  # closed loop: users, each waiting for its answer; null: 1 and 4, none beside rates
    rate: Any = field(default_factory=list)  # open loop: requests a second, as a Poisson process
    prompt_tokens: int = 256  # the median, if prompt_sigma is not 0
    output_tokens: int = 64
    prompt_sigma: float = 0.0  # sigma of the lognormal distribution of lengths; 0: all alike
    output_sigma: float = 0.0
    prompts: str | None = (
        None  # file with lines of {"prompt": text or ids, "output_tokens": optional}; null: random ids
    )
    temperature: float = 1.0
    seed: int = 0
    repeats: int = 6  # each with a server of its own; even: rounds go forth and back over all rows
    max_repeats: int = 12  # of a row whose requests cannot tell yet whether they keep its limits
    requests: int = 8  # of each user in each repeat of a closed loop, at most, beside its first, which is left out
    seconds: float = 20.0  # of a repeat: after this no request is sent
    warmup: int = 1  # requests of each user before each repeat, not counted
    start_seconds: float = 600.0  # within which a server must be ready
    stall_seconds: float = 60.0  # a request that brings no token for so long has failed
    limits: Limits = field(default_factory=Limits)
    objective: str = "tpot_p50_ms"  # what decides: a figure of results.csv; with a minus in front, higher is better
    worth: float = 0.02  # share by which a configuration's objective must be better to be chosen over the first
    gate: bool = True  # greedy tokens must equal the first configuration's, except at ties
    gate_tokens: int = 16
    gate_tie: float = 0.125  # two tokens tie if their log probabilities differ by at most this: a step of bfloat16
    steps: bool = True  # time the step of every bucket, in a separate process before the server starts
    dry_run: bool = False  # print what would run, how long it would take and what does not fit
    fresh: bool = False  # measure again even what has been measured at this commit
    compare: str | None = None  # folder of an earlier sweep to compare with


@dataclass
class SweepRun(Composed):
    """The configuration of serve.py, and the sweep's group."""

    sweep: SweepConfig = field(default_factory=SweepConfig)


def register() -> None:
    """Register SweepRun with Hydra under the name of serve.py's schema, so that conf/config.yaml needs no change."""
    ConfigStore.instance().store("schema", SweepRun)


def load(composed: Any) -> SweepConfig:
    """The `sweep` group of a composed configuration, checked. Raises ConfigError with one line."""
    try:
        run = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'sweep'}: {str(error).splitlines()[0]}") from error
    assert isinstance(run, SweepRun)
    settings = run.sweep
    settings.rate = _numbers("rate", settings.rate, float)
    if settings.concurrency is None:
        settings.concurrency = [] if settings.rate else [1, 4]
    settings.concurrency = _numbers("concurrency", settings.concurrency, int)

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
    ):
        require(getattr(settings, key) > 0, key, "more than 0")
    for key in ("prompt_sigma", "output_sigma", "warmup", "gate_tie", "worth"):
        require(getattr(settings, key) >= 0, key, "0 or more")
    require(settings.repeats % 2 == 0, "repeats", "an even number: rounds go forth and back over all rows")
    require(settings.max_repeats >= settings.repeats, "max_repeats", f"at least sweep.repeats = {settings.repeats}")
    return settings


def _numbers(key: str, given: Any, kind: type[int] | type[float]) -> list[Any]:
    """A positive number or several -> a list. Raises ConfigError."""
    numbers = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 and kind(n) == n for n in numbers):
        raise ConfigError(f"sweep.{key}: got {given!r}, allowed: positive numbers, one or a list")
    return [kind(n) for n in numbers]
