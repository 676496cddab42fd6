"""Processes that do what would hold up the event loop: large requests are decoded, checked, rendered and encoded there.

All of that keeps the interpreter's lock for as long as it takes, so that a thread would not help. Knows processes and
pipes; of requests only what takes long to load, to have it before the first comes.
"""

import asyncio
import importlib
import logging
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple, TypeVar, TypeVarTuple, cast

from engine.lifetime import Child
from engine.tokenizer import Tokenizer
from serve.protocol import ApiError

SMALL, LARGE = 2, 1  # processes for each of the two lines in which functions wait
LARGE_BYTES = 128 * 1024  # more is large: reading 16 MiB may take half a minute, which most requests must not wait for
NICENESS = 5  # where there are few cores, the event loop and the ranks go first

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Returned(NamedTuple):
    """What a function returned."""

    value: object


class Failed(NamedTuple):
    """A function raised what is no answer to a client."""

    trace: str


class EndedBefore(Exception):
    """A worker ended before it took the function that it was to run."""


class Worker:
    """A process that runs one function at a time."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self.process = Child("a worker", "serve.workers:work", theirs.fileno(), files=[theirs.fileno()])

    def run(self, function: Callable[..., Result], arguments: tuple[object, ...]) -> Result:
        """`function(*arguments)`, waited for. Function, arguments and result are pickled.

        Raises ApiError where the function does, EndedBefore when the process ended before it took it, EOFError or
        OSError when it ended later, RuntimeError with the traceback for any other exception of the function.
        """
        try:
            self._connection.send((function, arguments))
            self._connection.recv()
        except (EOFError, OSError) as error:
            raise EndedBefore from error
        outcome = self._connection.recv()
        if isinstance(outcome, ApiError):
            raise outcome
        if isinstance(outcome, Failed):
            raise RuntimeError(f"in a worker:\n{outcome.trace}")
        assert isinstance(outcome, Returned)
        return cast(Result, outcome.value)


class Workers:
    """Workers that are started when they are first needed, or by `start`. Its owner calls `close` in the end."""

    def __init__(self, small: int = SMALL, large: int = LARGE) -> None:
        """How many functions with small and with large arguments may run at once."""
        self._small, self._large = ThreadPoolExecutor(small), ThreadPoolExecutor(large)  # a thread waits for a worker
        self._processes = small + large
        self._all: set[Worker] = set()
        self._idle: list[Worker] = []
        self._functions: set[Future[Any]] = set()
        self._closed = False
        self._ending = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [worker.process.pid for worker in self._all]

    @property
    def outstanding(self) -> int:
        """How many functions run or wait for their turn."""
        return len(self._functions)

    def start(self) -> None:
        """Start the processes, so that the first request need not wait for that. The caller's thread must last."""
        while len(self._all) < self._processes:
            self._idle.append(self._begin())

    async def run(self, size: int, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """`function(*arguments)` in a worker; it reads `size` bytes, which decide in which line it waits.

        Cancelled before its turn it never runs; later, its result is dropped. Raises ApiError where the function does,
        and 503 where the worker ends before.
        """
        threads = self._large if size > LARGE_BYTES else self._small
        future = threads.submit(self._run, function, arguments)
        self._functions.add(future)
        future.add_done_callback(self._functions.discard)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the processes. A second time does nothing."""
        self._closed = True
        for threads in (self._small, self._large):
            threads.shutdown(wait=False, cancel_futures=True)
        with self._ending:
            for worker in self._all:
                worker.process.kill()
            self._all.clear()

    def _begin(self) -> Worker:
        with self._ending:
            if self._closed:
                raise ApiError(503, "the server is shutting down", code="draining")
            worker = Worker()
            self._all.add(worker)
        return worker

    def _take(self) -> Worker:
        """A worker that does nothing yet."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.ending is None:
                return worker
            self._bury(worker)
        return self._begin()

    def _bury(self, worker: Worker) -> str:
        """Forget a worker that has ended; how it ended."""
        with self._ending:
            worker.process.kill()
            self._all.discard(worker)
        ending = worker.process.ending or ""
        if not self._closed:
            log.error("%s; another is started", ending)
        return ending

    def _run(self, function: Callable[..., Result], arguments: tuple[object, ...]) -> Result:
        ending = ""
        for _ in range(self._processes + 1):  # all that are idle may have ended
            worker = self._take()
            try:
                result = worker.run(function, arguments)
            except EndedBefore:
                ending = self._bury(worker)
                continue
            except (EOFError, OSError):
                ending = self._bury(worker)
                break
            except BaseException:
                self._idle.append(worker)
                raise
            self._idle.append(worker)
            return result
        message = f"{ending}; the request was not prepared"
        raise ApiError(503, message, code="worker_ended", headers={"Retry-After": "1"})


def work(descriptor: int) -> None:
    """What a worker's process does: run what comes over the connection, until its other end is closed."""
    os.nice(NICENESS)
    importlib.import_module("serve.app")
    Tokenizer()
    with suppress(EOFError), Connection(descriptor) as connection:
        while True:
            function, arguments = connection.recv()
            connection.send(None)  # it is taken: `EndedBefore` is over
            try:
                outcome: object = Returned(function(*arguments))
            except ApiError as error:
                outcome = error
            except Exception:
                outcome = Failed(traceback.format_exc())
            del arguments  # a body may be large
            connection.send(outcome)
