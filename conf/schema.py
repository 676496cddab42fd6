"""The typed configuration and its cross-field checks.

Hydra composes the YAML files of this folder, `load` turns the result into these dataclasses. The YAML only
overrides what stands here. Imports nothing of ours but `conf.limits`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from operator import attrgetter
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.limits import MAX_DECODE_ROWS, MAX_PREFILL_SEQUENCES, PAGE_TOKENS, VOCABULARY


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, what was given and what is allowed."""


class Weights(Enum):
    checkpoint = "checkpoint"  # read `model.path`
    random = "random"  # seeded values in the shapes of `model.random_shape`: speed without a checkpoint
    demo = "demo"  # the model that ships with the project


class Kernels(Enum):
    auto = "auto"  # hopper on a GPU, reference on a CPU
    hopper = "hopper"  # the H100's
    reference = "reference"  # plain torch: the oracle, and what runs on a CPU


class Device(Enum):
    auto = "auto"  # cuda where there is a GPU
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"  # reference kernels only, to compare with other implementations


@dataclass
class RandomShape:
    """What `weights: random` builds, in config.json's names; by default gpt-oss-20b. A checkpoint has its own."""

    num_hidden_layers: int = 24
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    vocab_size: int = VOCABULARY
    sliding_window: int = 128


GPT_OSS_20B = RandomShape()
GPT_OSS_120B = RandomShape(num_hidden_layers=36, num_local_experts=128)


@dataclass
class ModelConfig:
    name: str = MISSING  # as clients see it in /v1/models
    weights: Weights = Weights.checkpoint
    path: str | None = None  # checkpoint folder, Hugging Face or original layout
    random_shape: RandomShape = field(default_factory=RandomShape)


@dataclass
class BucketsConfig:
    decode_rows: list[int] = MISSING  # one graph each: running requests a decode step takes
    prefill_tokens: list[int] = MISSING  # one graph each: packed prompt tokens a prefill step takes
    # One graph each: packed prompt tokens of a prefill step that also computes log probabilities of its prompts, for
    # requests that want them (echo with logprobs, prompt_logprobs). null: as prefill_tokens; []: they are refused.
    prompt_logprobs: list[int] | None = None
    prefill_sequences: int = MISSING  # prompts a prefill step packs at most
    max_context: int = MISSING  # tokens of prompt and answer together
    page_memory: float = 0.9  # fraction of the memory left beside weights and graphs that becomes key/value pages
    pages: int | None = None  # number of pages, instead of a fraction of the memory

    @property
    def score_tokens(self) -> list[int]:
        """`prompt_logprobs`, with null resolved."""
        return self.prefill_tokens if self.prompt_logprobs is None else self.prompt_logprobs


@dataclass
class KernelsConfig:
    name: Kernels = Kernels.auto
    dtype: Dtype = Dtype.bfloat16
    device: Device = Device.auto


@dataclass
class ServerConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    also_named: list[str] = field(default_factory=list)  # names of the model that requests may use beside model.name
    cors_origins: list[str] = field(default_factory=list)  # pages of these origins may call, such as https://a.example
    api_key_file: str | None = None  # one key a line, # begins comments; all routes but health and metrics need one
    salt_by_key: bool = True  # with API keys: requests find cached prompts of their own key alone
    # Kept in memory: of /v1/responses what previous_response_id names, of /v1/messages, as many again, the reasoning
    # before calls that a client was not shown; 0 keeps none
    stored_responses: int = 256
    stored_bytes: int = 64 * 2**20  # of JSON, over all of them
    stored_seconds: float = 3600.0  # each is kept at most
    require_json_type: bool = True  # bodies need the content type of JSON; without a type, those of web pages do
    max_queue: int = 1024  # requests waiting or running; one more answers 429
    max_body_bytes: int = 16 * 2**20
    max_bytes_in_flight: int = 256 * 2**20  # of the bodies of all requests that are not answered yet; more answer 503
    max_connections: int = 2048  # more answer 503, but for health and metrics
    receive_timeout: float = 20.0  # seconds for a request to arrive, and one more for every 16 KiB of its body
    request_timeout: float = 3600.0  # seconds, then the request ends with an error
    drain_seconds: float = 30.0  # after a signal to end, for requests in flight
    step_deadline: float = 120.0  # seconds without a finished step while work is pending: unhealthy, and exit
    log_level: str = "info"


@dataclass
class _Groups:
    model: ModelConfig = field(default_factory=ModelConfig)
    buckets: BucketsConfig = field(default_factory=BucketsConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass
class Composed(_Groups):
    """What Hydra composes; `load` makes a Config of it."""

    tp: int | None = None  # null means 1: Hydra then takes tp=2 and +tp=2 alike


@dataclass
class Config(_Groups):
    """A configuration that passed all checks."""

    tp: int = 1  # tensor-parallel ranks, one a GPU

    def with_checkpoint(self, folder: Path) -> "Config":
        """The same configuration with the weights of this folder."""
        return replace(self, model=replace(self.model, weights=Weights.checkpoint, path=str(folder)))


def register() -> None:
    """Make `Composed` the base that conf/config.yaml builds on, so that Hydra knows every key and type."""
    ConfigStore.instance().store("schema", Composed)


def compose(overrides: Sequence[str]) -> Config:
    """The configuration that `python serve.py OVERRIDES…` runs. Raises ConfigError with one line."""
    register()
    try:
        with hydra.initialize_config_module("conf", version_base="1.3"):
            composed = hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    return load(composed)


def one_line(error: Exception) -> str:
    """What is wrong: the reports of Hydra and OmegaConf span lines and leave the reason to the cause."""
    report = str(error).split("Config search path:")[0]
    if error.__cause__ and isinstance(error, HydraException):
        report += "\n" + str(error.__cause__).splitlines()[0]
    return "; ".join(line.strip() for line in report.splitlines() if line.strip())


def load(composed: DictConfig) -> Config:
    """Composed Hydra configuration -> validated Config. Raises ConfigError with one line."""
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Composed), OmegaConf.to_container(composed)))
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, Composed)
    tp = 1 if typed.tp is None else typed.tp
    config = Config(typed.model, typed.buckets, typed.kernels, typed.server, tp)
    check(config)
    return config


def check(config: Config) -> None:
    """Cross-field checks. Raises ConfigError at the first that fails.

    A key that the rest of the configuration would leave without effect is an error too.
    """
    buckets, kernels, server, model = config.buckets, config.kernels, config.server, config.model

    def require(holds: bool, key: str, allowed: str) -> None:
        if not holds:
            value = attrgetter(key)(config)
            raise ConfigError(
                f"{key}: got {value.name if isinstance(value, Enum) else repr(value)}, allowed: {allowed}"
            )

    require(config.tp in (1, 2, 4, 8), "tp", "1, 2, 4 or 8")
    kind = f"model.weights={model.weights.name}"
    if model.weights is Weights.checkpoint:
        require(bool(model.path), "model.path", "a checkpoint folder, or model.weights=random")
    else:
        require(model.path is None, "model.path", f"null with {kind}; model=gpt-oss-20b reads it")
    unchanged = model.random_shape in (GPT_OSS_20B, GPT_OSS_120B)  # as the YAML of a published model sets it
    require(unchanged or model.weights is Weights.random, "model.random_shape", f"no change with {kind}, only random")
    for key, sizes in (("decode_rows", buckets.decode_rows), ("prefill_tokens", buckets.prefill_tokens)):
        ascending = sizes == sorted(set(sizes)) and all(size > 0 for size in sizes)
        require(bool(sizes) and ascending, f"buckets.{key}", "positive sizes in ascending order, each once")
    require(buckets.decode_rows[-1] <= MAX_DECODE_ROWS, "buckets.decode_rows", f"at most {MAX_DECODE_ROWS} rows")
    largest = f"a largest bucket of at least one page ({PAGE_TOKENS} tokens)"
    require(buckets.prefill_tokens[-1] >= PAGE_TOKENS, "buckets.prefill_tokens", largest)
    scored, page, most = buckets.score_tokens, PAGE_TOKENS, buckets.prefill_tokens[-1]
    fits = not scored or (scored == sorted(set(scored)) and scored[0] > 0 and page <= scored[-1] <= most)
    allowed = f"null, none, or positive sizes in ascending order, each once, the largest {page} to {most} tokens"
    require(fits, "buckets.prompt_logprobs", f"{allowed} as that of prefill_tokens")
    sequences = 1 <= buckets.prefill_sequences <= MAX_PREFILL_SEQUENCES
    require(sequences, "buckets.prefill_sequences", f"1 to {MAX_PREFILL_SEQUENCES}")
    whole_pages = buckets.max_context > 0 and buckets.max_context % PAGE_TOKENS == 0
    require(whole_pages, "buckets.max_context", f"a positive multiple of {PAGE_TOKENS}")
    require(0 < buckets.page_memory <= 1, "buckets.page_memory", "more than 0, at most 1")
    require(buckets.pages is None or buckets.pages >= 2, "buckets.pages", "null or at least 2")
    default = BucketsConfig.page_memory
    unused = buckets.pages is not None and buckets.page_memory != default
    require(not unused, "buckets.page_memory", f"no change ({default}) with buckets.pages={buckets.pages}")
    if kernels.name is Kernels.hopper:
        require(kernels.dtype is Dtype.bfloat16, "kernels.dtype", "bfloat16 with kernels.name=hopper")
        require(kernels.device is not Device.cpu, "kernels.device", "auto or cuda with kernels.name=hopper")
    require(1 <= server.port <= 65535, "server.port", "1 to 65535")
    positive = ("max_queue", "max_body_bytes", "max_connections", "request_timeout", "receive_timeout", "step_deadline")
    for key in positive:
        require(getattr(server, key) > 0, f"server.{key}", "more than 0")
    require(server.stored_responses >= 0, "server.stored_responses", "0 or more")
    for key in ("stored_bytes", "stored_seconds"):
        require(getattr(server, key) > 0, f"server.{key}", "more than 0; server.stored_responses=0 keeps none")
        unused = server.stored_responses == 0 and getattr(server, key) != getattr(ServerConfig, key)
        require(not unused, f"server.{key}", "no change with server.stored_responses=0")
    enough = server.max_bytes_in_flight >= server.max_body_bytes
    require(enough, "server.max_bytes_in_flight", f"at least server.max_body_bytes = {server.max_body_bytes}")
    wrong = [origin for origin in server.cors_origins if not re.fullmatch(r"https?://[^/*\s]+", origin)]
    require(not wrong, "server.cors_origins", "origins in full, scheme://host[:port]; no wildcard")
    keyed = server.api_key_file is not None or server.salt_by_key
    require(keyed, "server.salt_by_key", "no change (true) without server.api_key_file")
    require(all(server.also_named), "server.also_named", "names that are not empty")
    require(server.drain_seconds >= 0, "server.drain_seconds", "0 or more")
    levels = ("critical", "error", "warning", "info", "debug")
    require(server.log_level in levels, "server.log_level", ", ".join(levels))
