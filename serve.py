"""The server's start: compose and validate the configuration, start the ranks, serve HTTP, and stop in order.

    python serve.py                                  # the demo model, on whatever is there
    python serve.py model=gpt-oss-20b model.path=/models/gpt-oss-20b +tp=2

Nothing imports this. It never imports torch: the ranks do, each in its own process.
"""

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import hydra
import uvicorn
import uvloop
from fastapi import FastAPI
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf.limits import PAGE_TOKENS
from conf.schema import Config, ConfigError, load, one_line, register
from demo.bundle import with_demo_folder
from engine.messages import Ready
from serve.app import create_app
from serve.client import EngineClient
from serve.framing import Protocol

MOST_SOCKET_PATH = 107  # bytes that Linux takes
FLUSH_SECONDS = 3  # for answers that say why, once the engine is lost
# Of an unused connection, longer than clients and load balancers keep theirs (Google Cloud's: 600). A server that
# closes first may do so while a request is on its way, which then fails.
KEEP_ALIVE_SECONDS = 620

log = logging.getLogger("mini-vllm")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    try:
        config = load(composed)
        logging.basicConfig(level=config.server.log_level.upper(), format="%(levelname)s %(message)s")
        logging.getLogger("uvicorn").setLevel("WARNING")  # its start and stop lines say less than ours
        status = uvloop.run(serve(config))
    except ConfigError as error:  # here, because Hydra announces what leaves this function
        sys.exit(f"configuration: {error}")
    sys.exit(status)


async def serve(config: Config) -> int:
    """Serve until a signal or a dead rank; the process's exit status. Raises ConfigError."""
    listener = listen(config.server.host, config.server.port)
    room = MOST_SOCKET_PATH - len("/mini-vllm-01234567/requests")
    if len(os.fsencode(tempfile.gettempdir())) > room:
        raise ConfigError(f"TMPDIR: got {tempfile.gettempdir()}, allowed: at most {room} bytes: sockets go there")
    run_folder = tempfile.mkdtemp(prefix="mini-vllm-")
    os.chmod(run_folder, 0o700)
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=start_rank, args=(config, rank, run_folder), name=f"rank {rank}")
        for rank in range(config.tp)
    ]
    client = EngineClient(run_folder, config.server.step_deadline, summarize(config))
    try:
        app = create_app(client, config.server, config.model.name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"server.api_key_file: {error}") from error
    server = Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, http=Protocol, lifespan="off", timeout_keep_alive=KEEP_ALIVE_SECONDS
        )
    )
    loop = asyncio.get_running_loop()
    stop = Stop(app, client, server, config.server.drain_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.signalled, number)
    try:
        for process in ranks:
            process.start()
            loop.add_reader(process.sentinel, stop.rank_died, loop, process)
        log.info("starting %s on http://%s:%d", config.model.name, config.server.host, config.server.port)
        delivery = loop.create_task(client.run())
        delivery.add_done_callback(lambda _: stop.engine_failed())
        await server.serve(sockets=[listener])
    finally:
        for process in ranks:
            if process.pid:
                loop.remove_reader(process.sentinel)
                process.kill()
                process.join()
        shutil.rmtree(run_folder, ignore_errors=True)
    return stop.status


def start_rank(config: Config, rank: int, run_folder: str) -> None:
    """The process of a rank; never returns."""
    from engine.rank import run_rank  # here, so that only the ranks pay for torch

    try:
        config = with_demo_folder(config)
    except ConfigError as error:
        sys.exit(f"ERROR rank {rank}: cannot start: {error}")
    run_rank(config, rank, run_folder)


def listen(host: str, port: int) -> socket.socket:
    """Bound before the ranks start: a port in use must not cost a model load. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"server.host, server.port: cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would refuse connections while draining, where a 503 is due."""

    def install_signal_handlers(self) -> None:
        pass

    from contextlib import nullcontext as capture_signals


class Stop:
    """The ways a server ends: drained, stopped at once, or lost with a rank. `status` is the exit status."""

    def __init__(self, app: FastAPI, client: EngineClient, server: Server, drain_seconds: float) -> None:
        self.status = 0
        self._app = app
        self._client = client
        self._server = server
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None

    def signalled(self, number: int) -> None:
        """The first signal drains, a second one stops at once."""
        if self._draining:
            self._server.should_exit = self._server.force_exit = True
            return
        log.info("%s: finishing %d requests in flight", signal.Signals(number).name, self._client.outstanding)
        self._app.state.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while self._client.outstanding and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if left := self._client.outstanding:
            log.warning("%d requests unfinished after server.drain_seconds = %g", left, self._drain_seconds)
            self._client.fail("the server was stopped")
            await asyncio.sleep(0.2)
        self._server.config.timeout_graceful_shutdown = FLUSH_SECONDS
        self._server.should_exit = True

    def rank_died(self, loop: asyncio.AbstractEventLoop, process: BaseProcess) -> None:
        loop.remove_reader(process.sentinel)
        process.join()
        code = process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._client.fail(f"{process.name} ended with {how}")
        self.engine_failed()

    def engine_failed(self) -> None:
        if self.status or not self._client.failure or self._draining:
            return
        self.status = 1
        log.critical("%s: the server stops", self._client.failure)
        self._server.config.timeout_graceful_shutdown = FLUSH_SECONDS
        self._server.should_exit = True


def summarize(config: Config) -> Callable[[Ready], None]:
    """What to log once the engine is ready: one summary, then the server is quiet."""

    def on_ready(ready: Ready) -> None:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ready.phases.items())
        memory = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in ready.memory.items())
        buckets = ", ".join(f"{kind} {sizes}" for kind, sizes in ready.buckets.items())
        log.info("model    %s, %s weights, %s", config.model.name, config.model.weights.name, config.kernels.dtype.name)
        log.info("ranks    %d on %s, kernels %s", ready.tp, ready.device, ready.kernels)
        log.info("buckets  %s", buckets)
        log.info("pages    %d of %d tokens, context %d", ready.pages, PAGE_TOKENS, ready.max_context)
        log.info("memory   %s", memory)
        log.info("phases   %s", phases)
        log.info("ready on http://%s:%d", config.server.host, config.server.port)

    return on_ready


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing a report of its own
    register()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"configuration: {one_line(error)}")
