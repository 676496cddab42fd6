"""Steps as something to launch: CUDA graphs on a GPU, the same body run eagerly in order on a CPU.

Both take a body for each bucket once (`capture`), then `launch` it over packed inputs without waiting, and return a
function that waits for it. Knows buffers and bodies; not what a body computes.
"""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from graphs.buckets import Bucket
from graphs.buffers import Buffers, Staging

Wait = Callable[[], None]  # returns once the step has run and its outputs lie in the staging; raises what it raised


class Steps(Protocol):
    """What runs a rank's steps."""

    def capture(self, bucket: Bucket, body: Callable[[], None]) -> None:
        """Prepare a bucket's step. `body` reads and writes the buffers, and never waits for the device."""

    def launch(self, bucket: Bucket, staging: Staging) -> Wait:
        """Start a step behind all launched before: inputs to the device, body, outputs back.

        The staging must not be touched until the returned function has been called and has returned.
        """


def steps_for(buffers: Buffers, cpu_threads: int) -> Steps:
    """What suits the buffers' device. `cpu_threads`: see EagerSteps."""
    return GraphSteps(buffers) if buffers.device.type == "cuda" else EagerSteps(buffers, cpu_threads)


def prepare_cpu_process() -> None:
    """Call first in a process whose EagerSteps should be fast; each line halves a small step's time on two cores.

    OpenMP counts the helper threads of this thread and of the steps' thread: where together they outnumber the cores,
    they sleep between operations. And glibc gives freed tensors back to the system, to fault them in again.
    """
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(parameter, 2**30)


class EagerSteps:
    """One worker thread stands in for the stream: launches return at once and run in order."""

    def __init__(self, buffers: Buffers, threads: int) -> None:
        """`threads` for each operation; see `prepare_cpu_process`."""
        self._buffers = buffers
        self._bodies: dict[Bucket, Callable[[], None]] = {}
        self._stream = ThreadPoolExecutor(1, "stream", torch.set_num_threads, (threads,))

    def capture(self, bucket: Bucket, body: Callable[[], None]) -> None:
        self._bodies[bucket] = body

    def launch(self, bucket: Bucket, staging: Staging) -> Wait:
        return self._stream.submit(self._run, bucket, staging).result

    @torch.inference_mode()
    def _run(self, bucket: Bucket, staging: Staging) -> None:
        words = self._buffers.used_words(bucket, staging)
        self._buffers.words[:words].copy_(staging.words[:words])
        self._bodies[bucket]()
        staging.outputs[: bucket.sequences].copy_(self._buffers.outputs[: bucket.sequences])
        if bucket.kind == "score":
            staging.scores[: bucket.tokens].copy_(self._buffers.scores[: bucket.tokens])


class GraphSteps:
    """One CUDA graph a bucket, all in one memory pool: capture the largest first, so that the others fit in it."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        gc.collect()

    @torch.inference_mode()
    def capture(self, bucket: Bucket, body: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()  # once without capture, which forbids that libraries and lazily loaded kernels initialise
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # a graph that is freed during a capture would end that
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                body()
        finally:
            gc.enable()
        self._graphs[bucket] = graph

    @torch.inference_mode()
    def launch(self, bucket: Bucket, staging: Staging) -> Wait:
        words = self._buffers.used_words(bucket, staging)
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._buffers.words[:words].copy_(staging.words[:words], non_blocking=True)
            self._graphs[bucket].replay()
            staging.outputs[: bucket.sequences].copy_(self._buffers.outputs[: bucket.sequences], non_blocking=True)
            if bucket.kind == "score":
                staging.scores[: bucket.tokens].copy_(self._buffers.scores[: bucket.tokens], non_blocking=True)
            done.record()
        return done.synchronize
