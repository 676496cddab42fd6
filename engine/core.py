"""The only loop: plan, choose a bucket, load, replay, collect, publish; and how a rank gets ready for it.

Rank 0 schedules and talks to the HTTP process; the other ranks follow its steps. The host plans and launches step n+1
while step n runs, and only then waits for n's tokens. Knows requests and steps; never sees text.
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import zmq

import kernels
from conf.limits import PAGE_TOKENS
from conf.schema import Config, ConfigError, Device, Weights
from demo.bundle import demo_folder
from engine import checkpoint
from engine.checkpoint import Architecture, CheckpointError, ModelWeights
from engine.messages import Abort, BucketStats, Delta, FromEngine, Ready, Stats, StepReport, ToEngine, TokenLogprobs
from engine.model import Model
from engine.pages import PagePool
from engine.parallel import Ranks, StepChannel
from engine.scheduler import Scheduled, Scheduler
from graphs.buckets import Bucket, Buckets
from graphs.buffers import Buffers, Sampled, Staging
from graphs.capture import Steps, Wait, prepare_cpu_process, steps_for
from kernels.build import BuildError

GRAPH_RESERVE = 256 * 2**20  # bytes left free on a GPU beside weights, graphs and pages
IDLE_POLL = 1000  # milliseconds

log = logging.getLogger(__name__)


class Launched(NamedTuple):
    scheduled: Scheduled
    bucket: Bucket
    staging: Staging
    wait: Wait


class Core:
    """Rank 0's loop body, over parts that it is given; one step in flight while the next is planned."""

    def __init__(
        self,
        scheduler: Scheduler,
        buffers: Buffers,
        steps: Steps,
        send: Callable[[int, Staging, Bucket], None],
        publish: Callable[[FromEngine], None],
    ) -> None:
        """`send` hands a bucket's index and filled staging to the other ranks, `publish` a message to HTTP."""
        self._scheduler = scheduler
        self._buffers = buffers
        self._steps = steps
        self._send = send
        self._publish = publish
        self._stagings = (buffers.staging(), buffers.staging())
        self._in_flight: Launched | None = None
        self._turn = 0
        self._index = {bucket: index for index, bucket in enumerate(buffers.buckets.all)}
        self._used = [[0, 0] for _ in self._index]  # steps and rows used, by bucket

    def handle(self, message: ToEngine) -> None:
        if isinstance(message, Abort):
            self._scheduler.abort(message.id)
            return
        try:
            self._scheduler.add(message, time.monotonic())
        except ValueError as error:
            self._publish(StepReport([Delta(message.id, [], "error", error=str(error))], self.stats()))

    def turn(self) -> bool:
        """Launch the next step if there is one, then collect the one before. False when there was nothing to do."""
        scheduled = self._scheduler.schedule(time.monotonic())
        launched = self._launch(scheduled) if scheduled else None
        collected, self._in_flight = self._in_flight, launched
        if collected:
            self._collect(collected)
        return bool(launched or collected)

    def _launch(self, scheduled: Scheduled) -> Launched:
        step = scheduled.step
        kind, tokens = ("prefill", step.tokens) if hasattr(step, "chunks") else ("decode", len(step.slots))
        bucket = self._buffers.buckets.choose(kind, tokens)
        staging = self._stagings[self._turn % 2]  # the other one belongs to the step in flight
        self._turn += 1
        self._buffers.fill(step, bucket, staging)
        index = self._index[bucket]
        self._send(index, staging, bucket)
        self._used[index][0] += 1
        self._used[index][1] += tokens
        return Launched(scheduled, bucket, staging, self._steps.launch(bucket, staging))

    def _collect(self, launched: Launched) -> None:
        launched.wait()
        rows = launched.scheduled.rows
        sampled = self._buffers.sampled(launched.staging, len(rows))
        deltas = self._scheduler.update(launched.scheduled, sampled.tokens, lambda row, n: _logprobs(sampled, row, n))
        self._publish(StepReport(deltas, self.stats()))

    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            pages_used=scheduler.pool.used,
            pages_total=scheduler.pool.total,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            buckets=[
                BucketStats(bucket.kind, bucket.tokens, steps, used, steps * bucket.tokens - used)
                for bucket, (steps, used) in zip(self._index, self._used, strict=True)
            ],
        )


def _logprobs(sampled: Sampled, row: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(
        float(sampled.logprobs[row]), sampled.top_ids[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist()
    )


class Engine(NamedTuple):
    """One rank, ready to run steps."""

    model: Model
    buffers: Buffers
    steps: Steps
    ready: Ready


def build(config: Config, ranks: Ranks, device: torch.device) -> Engine:
    """Load, size the pages, capture. Raises BuildError, CheckpointError, ConfigError, or torch.OutOfMemoryError."""
    phases: dict[str, float] = {}
    began = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal began
        if device.type == "cuda":
            torch.cuda.synchronize()
        phases[name], began = time.perf_counter() - began, time.perf_counter()

    dtype = getattr(torch, config.kernels.dtype.name)
    ops = kernels.choose(config.kernels.name.value, device, dtype)
    shape, weights = _weights(config, ranks, device, dtype)
    buckets = Buckets.of(config.buckets.decode_rows, config.buckets.prefill_tokens, config.buckets.prefill_sequences)
    context = config.buckets.max_context
    if context > shape.max_positions:
        raise ConfigError(f"buckets.max_context: got {context}, allowed: at most the model's {shape.max_positions}")
    parts = [vars(part).values() for part in (weights, *weights.layers)]
    weights_bytes = sum(value.nbytes for part in parts for value in part if isinstance(value, torch.Tensor))
    del parts  # the model lets go of what it has packed
    prefill = buckets.prefill[-1].tokens
    peers = ops.join(ranks, buckets.max_rows, prefill, config.buckets.prefill_sequences, shape.hidden, device)
    model = Model(shape, weights, ops, peers, context)
    phase("weights")

    dimensions = {
        "buckets": buckets,
        "layers": shape.layers,
        "kv_heads": shape.kv_heads // ranks.size,
        "head_dim": shape.head_dim,
        "vocab": shape.vocab,
        "max_context": context,
        "device": device,
        "dtype": dtype,
    }
    page_bytes = Buffers.page_bytes(shape.layers, shape.kv_heads // ranks.size, shape.head_dim, dtype)
    scratch = _warm_up(model, Buffers(**dimensions, pages=2)) if device.type == "cuda" else 0
    phase("warm-up")
    pages = ranks.smallest(config.buckets.pages or _pages_that_fit(config, buckets, page_bytes, scratch, device))
    if pages < 2:
        raise ConfigError(f"buckets.page_memory: {config.buckets.page_memory} leaves no memory for key/value pages")
    buffers = Buffers(**dimensions, pages=pages)
    steps = steps_for(buffers, max(1, (os.cpu_count() or 1) // ranks.size))
    for bucket in sorted(buckets.all, key=lambda bucket: -bucket.tokens):
        steps.capture(bucket, model.step(bucket, buffers))
    phase("capture")

    memory = {"weights": weights_bytes, "pages": pages * page_bytes}
    if device.type == "cuda":
        memory["free"] = torch.cuda.mem_get_info()[0]
    ready = Ready(
        shape.vocab,
        context,
        pages,
        torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        ops.name,
        ranks.size,
        phases,
        memory,
        {"decode": [b.tokens for b in buckets.decode], "prefill": [b.tokens for b in buckets.prefill]},
    )
    return Engine(model, buffers, steps, ready)


def _weights(
    config: Config, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> tuple[Architecture, ModelWeights]:
    model = config.model
    if model.weights is Weights.random:
        shape = Architecture.from_random_shape(model.random_shape)
        return shape, checkpoint.random_weights(shape, ranks.rank, ranks.size, device, dtype)
    folder = demo_folder() if model.weights is Weights.demo else Path(model.path)
    return checkpoint.load(folder, ranks.rank, ranks.size, device, dtype, progress=ranks.rank == 0)


@torch.inference_mode()
def _warm_up(model: Model, buffers: Buffers) -> int:
    """Run the largest steps over nothing but spare rows; the bytes they took at most beside the buffers."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for bucket in (buffers.buckets.prefill[-1], buffers.buckets.decode[-1]):
        staging = buffers.staging()
        for name in ("slots", "sequence_slots", "sample_slots"):
            if hasattr(staging.inputs[bucket], name):
                getattr(staging.inputs[bucket], name)[:] = buffers.spare_slot
        buffers.words.copy_(staging.words)
        model.step(bucket, buffers)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _pages_that_fit(config: Config, buckets: Buckets, page_bytes: int, scratch: int, device: torch.device) -> int:
    """Scratch page included. On a CPU no more than every row's full context: memory there is for others too."""
    most = buckets.max_rows * config.buckets.max_context // PAGE_TOKENS + 1
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - scratch - GRAPH_RESERVE
        return int(free * config.buckets.page_memory) // page_bytes
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return min(most, int(available * config.buckets.page_memory) // config.tp // page_bytes)


def run_rank(config: Config, rank: int, run_folder: str) -> None:
    """A rank's process, from start to kill: what `serve.py` spawns. Exits with 1 and one line if it cannot start."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the server
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when to stop
    logging.basicConfig(level=config.server.log_level.upper(), format=f"%(levelname)s rank {rank}: %(message)s")
    try:
        device = _device(config, rank)
        ranks = Ranks(rank, config.tp, Path(run_folder))
        engine = build(config, ranks, device)
        channel = StepChannel(ranks, engine.buffers.max_words, Path(run_folder))
        if rank == 0:
            _lead(engine, config, channel, run_folder)
        else:
            _follow(engine, channel)
    except (BuildError, CheckpointError, ConfigError, torch.OutOfMemoryError) as error:
        log.error("cannot start: %s", error)
        sys.exit(1)


def _device(config: Config, rank: int) -> torch.device:
    wanted = config.kernels.device
    if wanted is Device.cpu or (wanted is Device.auto and not torch.cuda.is_available()):
        prepare_cpu_process()
        return torch.device("cpu")
    if torch.cuda.device_count() <= rank:
        raise ConfigError(f"tp: got {config.tp}, allowed: at most {torch.cuda.device_count()}, the GPUs there are")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def _lead(engine: Engine, config: Config, channel: StepChannel, run_folder: str) -> None:
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(f"ipc://{run_folder}/requests")
    outbox.connect(f"ipc://{run_folder}/reports")
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(ToEngine).decode
    buffers = engine.buffers

    def send(index: int, staging: Staging, bucket: Bucket) -> None:
        channel.send(index, staging.words[: buffers.words_of(bucket)].numpy())

    def publish(message: FromEngine) -> None:
        outbox.send(encode(message))

    scheduler = Scheduler(PagePool(engine.ready.pages), buffers.buckets, engine.ready.max_context)
    core = Core(scheduler, buffers, engine.steps, send if config.tp > 1 else lambda *_: None, publish)
    publish(engine.ready)
    while True:
        if not core.turn():
            publish(StepReport([], core.stats()))
            while not inbox.poll(IDLE_POLL):
                pass
        while inbox.poll(0):
            core.handle(decode(inbox.recv()))


def _follow(engine: Engine, channel: StepChannel) -> None:
    buffers = engine.buffers
    stagings, waits = (buffers.staging(), buffers.staging()), [lambda: None, lambda: None]
    turn = 0
    while True:
        waits[turn]()  # the step before the last has left this staging
        bucket = buffers.buckets.all[channel.receive(stagings[turn].words.numpy())]
        waits[turn] = engine.steps.launch(bucket, stagings[turn])
        turn = 1 - turn
