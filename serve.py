"""The server's start: compose and validate the configuration, start the ranks, serve HTTP, and stop in order.

    python serve.py                                  # the demo model, on whatever is there
    python serve.py model=gpt-oss-20b model.path=/models/gpt-oss-20b +tp=2

Nothing imports this. It never imports torch: the ranks do, each in its own process.
"""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

import hydra
import uvicorn
import uvloop
from fastapi import FastAPI
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf.limits import PAGE_TOKENS
from conf.schema import Config, ConfigError, load, one_line, register
from engine.lifetime import Child, rank_process
from engine.messages import Ready
from engine.run_folder import RunFolder
from serve.app import create_app
from serve.client import EngineClient
from serve.connection import RESERVED, protocol_of
from serve.logs import RateLimit
from serve.workers import Workers

OWN_FILES = 64  # sockets, pipes and logs beside connections
SWITCH_SECONDS = 0.001  # a thread keeps the interpreter's lock; five times as long by default
BACKLOG = 2048  # connections that wait to be accepted
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
        for handler in logging.getLogger().handlers:
            handler.addFilter(RateLimit())
        logging.getLogger("uvicorn").setLevel("WARNING")  # its start and stop lines say less than ours
        status = uvloop.run(serve(config))
    except ConfigError as error:  # here, because Hydra announces what leaves this function
        sys.exit(f"configuration: {error}")
    sys.exit(status)


async def serve(config: Config) -> int:
    """Serve until a signal or a dead rank; the process's exit status. Raises ConfigError."""
    allow_files(config.server.max_connections)
    listener = listen(config.server.host, config.server.port)
    run_folder, workers = RunFolder(), Workers()
    client = EngineClient(run_folder.path, config.server.step_deadline, summarize(config))
    try:
        app = create_app(client, config.server, config.model.name, workers)
    except (OSError, ValueError) as error:
        run_folder.remove()
        raise ConfigError(f"server.api_key_file: {error}") from error
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http=protocol_of(config.server),
            lifespan="off",
            ws="none",
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
    )
    loop = asyncio.get_running_loop()
    # The loop waits for the interpreter's lock at most as long as each thread that wants it may keep it.
    sys.setswitchinterval(SWITCH_SECONDS)
    stop = Stop(app, client, server, config.server.drain_seconds, workers, run_folder)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, stop.signalled, number)
    loop.add_signal_handler(signal.SIGHUP, stop.hung_up, config.server.api_key_file)
    try:
        workers.start()
        for rank in range(config.tp):
            stop.watch(rank_process(config, rank, run_folder.path))
        log.info("starting %s on http://%s:%d", config.model.name, config.server.host, config.server.port)
        delivery = loop.create_task(client.run())
        delivery.add_done_callback(lambda _: stop.engine_failed())
        gc.collect()
        gc.freeze()  # what the imports made stays for ever: looking it through took 20 to 30 ms, now and then
        await server.serve(sockets=[listener])
    finally:
        stop.end()
    return stop.status


def listen(host: str, port: int) -> socket.socket:
    """Listening before the ranks start: a port in use must not cost a model load. Raises ConfigError.

    Of two servers that start at once, both may bind the port, and only one may listen.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"server.host, server.port: cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def allow_files(connections: int) -> None:
    """Raise this process's limit of open files to what so many connections need. Raises ConfigError."""
    need = connections + RESERVED + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < need:
        most = f"at most {max(0, hard - RESERVED - OWN_FILES)} where a process may open {hard} files (ulimit -n)"
        raise ConfigError(f"server.max_connections: got {connections}, allowed: {most}")
    if soft != resource.RLIM_INFINITY and soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would refuse connections while draining, where a 503 is due."""

    def install_signal_handlers(self) -> None:
        pass

    from contextlib import nullcontext as capture_signals


class Stop:
    """The ways a server ends: drained, stopped at once, or lost with its engine. `status` is the exit status."""

    def __init__(
        self,
        app: FastAPI,
        client: EngineClient,
        server: Server,
        drain_seconds: float,
        workers: Workers,
        run_folder: RunFolder,
    ) -> None:
        self.status = 0
        self._app = app
        self._client = client
        self._server = server
        self._drain_seconds = drain_seconds
        self._workers = workers
        self._run_folder = run_folder
        self._ranks: list[Child] = []
        self._draining: asyncio.Task[None] | None = None

    def watch(self, rank: Child) -> None:
        """A rank has started: its end is the server's."""
        self._ranks.append(rank)
        asyncio.get_running_loop().add_reader(rank.exited, self._rank_ended, rank)

    def end(self) -> None:
        """End the ranks and remove what is on the disk."""
        for rank in self._ranks:
            asyncio.get_running_loop().remove_reader(rank.exited)
            rank.kill()
        self._ranks.clear()
        self._workers.close()
        self._run_folder.remove()

    def signalled(self, number: int) -> None:
        """The first signal drains, a second one stops at once."""
        name = signal.Signals(number).name
        if self._draining:
            log.warning("%s again: stopping at once, %d requests unfinished", name, self._client.outstanding)
            self.end()
            logging.shutdown()
            os._exit(1)  # an orderly end would wait for clients, or report each of their requests as cancelled
        log.info("%s: finishing %d requests in flight", name, self._client.outstanding)
        self._app.state.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    def hung_up(self, key_file: str | None) -> None:
        """SIGHUP: read the API keys again where there are any; otherwise it is a signal like the others."""
        if key_file is None:
            self.signalled(signal.SIGHUP)
            return
        try:
            log.info("SIGHUP: %s holds %d keys", key_file, self._app.state.keys.read())
        except (OSError, ValueError) as error:
            log.error("SIGHUP: the API keys stay as they were: %s", error)

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while self._client.outstanding and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if left := self._client.outstanding:
            log.warning("%d requests unfinished after server.drain_seconds = %g", left, self._drain_seconds)
            self._client.stop()
            await asyncio.sleep(0.2)
        self._exit()

    def _rank_ended(self, rank: Child) -> None:
        asyncio.get_running_loop().remove_reader(rank.exited)
        self._client.fail(rank.ending or f"{rank.name} ended")
        for other in self._ranks:  # now: they wait for a dead one, or notice it with an error that names none
            asyncio.get_running_loop().remove_reader(other.exited)
            other.kill()
        self._ranks.clear()
        self.engine_failed()

    def engine_failed(self) -> None:
        """The client has stopped; unless the server has, that is the server's end."""
        if self.status or not self._client.failure:
            return
        self.status = 1
        log.critical("%s: the server stops", self._client.failure)
        self._exit()

    def _exit(self) -> None:
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
        if ready.max_context < config.buckets.max_context:
            configured = config.buckets.max_context
            log.warning("buckets.max_context: got %d, the pages hold %d", configured, ready.max_context)
        log.info("memory   %s", memory)
        log.info("phases   %s", phases)
        log.info("ready on http://%s:%d", config.server.host, config.server.port)

    return on_ready


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the server has its own handler: no traceback
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing a report of its own
    register()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"configuration: {one_line(error)}")
