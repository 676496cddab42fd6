"""From a configuration to a rank that is ready to run steps: weights, kernels, model, pages, buffers, capture.

The only composition of these: the server's ranks, the offline API, tests and benchmarks all come here. Knows nothing of
processes and sockets.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from conf.limits import PAGE_TOKENS
from conf.schema import Config, ConfigError, Device, Weights
from engine import checkpoint
from engine.architecture import Architecture, CheckpointError
from engine.core import Core, Send
from engine.messages import FromEngine, Ready
from engine.model import Model
from engine.pages import PagePool
from engine.parallel import Ranks
from engine.scheduler import Scheduler
from engine.weights import ModelWeights, random_weights
from graphs.buckets import Buckets
from graphs.buffers import Buffers
from graphs.capture import Steps, prepare_cpu_process, steps_for
from graphs.plan import full_step
from kernels.build import BuildError
from kernels.ops import UnsupportedError

GRAPH_RESERVE = 256 * 2**20  # bytes left free on a GPU beside weights, graphs and pages
MEMORY = Path("/proc/meminfo")
CANNOT_START = (BuildError, CheckpointError, ConfigError, OSError, torch.OutOfMemoryError)
KEYS = {  # of the configuration, by the argument that kernels refuse
    "name": "kernels.name",
    "dtype": "kernels.dtype",
    "ranks": "tp",
    "prefill_tokens": "buckets.prefill_tokens",
}


@dataclass(frozen=True)
class Engine:
    """One rank, ready to run steps."""

    model: Model
    buffers: Buffers
    steps: Steps
    ready: Ready

    def core(self, publish: Callable[[FromEngine], None], send: Send | None = None, prefix_cache: bool = True) -> Core:
        """Rank 0's loop over this engine, with an empty page pool. `send` reaches the other ranks, if there are any."""
        scheduler = Scheduler(PagePool(self.ready.pages), self.buffers.buckets, self.ready.max_context, prefix_cache)
        return Core(scheduler, self.buffers, self.steps, send, publish)


def device_of(config: Config, rank: int) -> torch.device:
    """The device that a rank computes on, made current. Raises ConfigError where there are fewer GPUs than ranks."""
    wanted = config.kernels.device
    if wanted is Device.cpu or (wanted is Device.auto and not torch.cuda.is_available()):
        prepare_cpu_process()
        return torch.device("cpu")
    if torch.cuda.device_count() <= rank:
        raise ConfigError(f"tp: got {config.tp}, allowed: at most {torch.cuda.device_count()}, the GPUs there are")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def start(config: Config, ranks: Ranks, device: torch.device) -> Engine:
    """Load, size the pages, capture. All ranks must call this. Raises CANNOT_START."""
    try:
        return _start(config, ranks, device)
    except UnsupportedError as error:
        raise ConfigError(f"{KEYS[error.argument]}: got {error.given}, allowed: {error.allowed}") from error


def _start(config: Config, ranks: Ranks, device: torch.device) -> Engine:
    phases: dict[str, float] = {}
    began = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal began
        if device.type == "cuda":
            torch.cuda.synchronize()
        phases[name], began = time.perf_counter() - began, time.perf_counter()

    dtype: torch.dtype = getattr(torch, config.kernels.dtype.name)
    ops = kernels.choose(config.kernels.name.value, device, dtype)
    shape, weights = _weights(config, ranks, device, dtype)
    sequences = config.buckets.prefill_sequences
    buckets = Buckets.of(
        config.buckets.decode_rows, config.buckets.prefill_tokens, sequences, config.buckets.score_tokens
    )
    context, rows = config.buckets.max_context, buckets.max_rows
    if context > shape.max_positions:
        raise ConfigError(f"buckets.max_context: got {context}, allowed: at most the model's {shape.max_positions}")
    weights_bytes = weights.bytes  # now, because the model lets go of what it has packed
    peers = ops.join(ranks, rows, buckets.prefill[-1].tokens, sequences, buckets.max_scored, shape.hidden, device)
    model = Model(shape, weights, ops, peers, context)
    phase("weights")

    def buffers_of(pages: int) -> Buffers:
        return Buffers(
            buckets=buckets,
            layers=shape.layers,
            kv_heads=shape.kv_heads // ranks.size,
            head_dim=shape.head_dim,
            vocab=shape.vocab,
            max_context=context,
            pages=pages,
            device=device,
            dtype=dtype,
        )

    scratch = _warm_up(model, buffers_of(pages=2)) if device.type == "cuda" else 0
    phase("warm-up")
    page_bytes = Buffers.page_bytes(shape.layers, shape.kv_heads // ranks.size, shape.head_dim, dtype)
    pages = ranks.smallest(config.buckets.pages or _pages_that_fit(config, page_bytes, scratch, device))
    if pages < 2:
        raise ConfigError(f"buckets.page_memory: {config.buckets.page_memory} leaves no memory for key/value pages")
    if device.type == "cpu" and pages * page_bytes > host_memory():  # a GPU says so itself
        most = host_memory() // page_bytes
        raise ConfigError(f"buckets.pages: got {pages}, allowed: at most {most}, which the available memory holds")
    buffers = buffers_of(pages)
    steps = steps_for(buffers, max(1, (os.cpu_count() or 1) // ranks.size))
    for bucket in sorted(buckets.all, key=lambda bucket: -bucket.tokens):
        steps.capture(bucket, model.step(bucket, buffers))
    phase("capture")

    memory = {"weights": weights_bytes, "pages": pages * page_bytes}
    if device.type == "cuda":
        memory["free"] = torch.cuda.mem_get_info()[0]
    ready = Ready(
        vocab_size=shape.vocab,
        max_context=min(context, (pages - 1) * PAGE_TOKENS),  # of one request: no more than all pages hold
        pages=pages,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        kernels=ops.name,
        tp=ranks.size,
        phases=phases,
        memory=memory,
        buckets={
            kind: [bucket.tokens for bucket in shapes]
            for kind, shapes in (("decode", buckets.decode), ("prefill", buckets.prefill), ("score", buckets.score))
            if shapes
        },
    )
    return Engine(model, buffers, steps, ready)


def _weights(
    config: Config, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> tuple[Architecture, ModelWeights]:
    model = config.model
    if model.weights is Weights.random:
        shape = Architecture.from_random_shape(model.random_shape)
        return shape, random_weights(shape, ranks.rank, ranks.size, device, dtype)
    if model.path is None:
        raise ConfigError("model.path: got None, allowed: a checkpoint folder")
    return checkpoint.load(model.path, ranks.rank, ranks.size, device, dtype, progress=ranks.rank == 0)


@torch.inference_mode()
def _warm_up(model: Model, buffers: Buffers) -> int:
    """Run the largest step of each kind; the bytes it took at most beside the buffers."""
    before, slots = torch.cuda.memory_allocated(), buffers.buckets.max_rows
    torch.cuda.reset_peak_memory_stats()
    for bucket in (*buffers.buckets.score[-1:], buffers.buckets.prefill[-1], buffers.buckets.decode[-1]):
        context = min(bucket.tokens // min(bucket.sequences, slots), buffers.context_pages * PAGE_TOKENS)
        staging = buffers.staging()
        buffers.fill(full_step(bucket, context, slots), bucket, staging)
        buffers.words.copy_(staging.words)
        model.step(bucket, buffers)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _pages_that_fit(config: Config, page_bytes: int, scratch: int, device: torch.device) -> int:
    """Scratch page included. On a CPU no more than every row's full context: memory there is for others too."""
    fraction = config.buckets.page_memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - scratch - GRAPH_RESERVE
        return int(free * fraction) // page_bytes
    most = config.buckets.decode_rows[-1] * config.buckets.max_context // PAGE_TOKENS + 1
    return min(most, int(host_memory() * fraction) // config.tp // page_bytes)


def host_memory() -> int:
    """Bytes of this machine's memory that are available."""
    return next(int(line.split()[1]) * 1024 for line in MEMORY.open() if line.startswith("MemAvailable"))
