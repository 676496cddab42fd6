"""A rank's process: what `serve.py` spawns, one a GPU.

Rank 0 leads: it schedules and talks to the HTTP process through two sockets. The others follow its steps. Knows
processes, sockets and the order of a start; nothing of what a step computes.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from conf.schema import Config
from demo.bundle import with_demo_folder
from engine.channel import StepChannel
from engine.messages import FromEngine, StepReport, ToEngine
from engine.parallel import Ranks
from engine.start import CANNOT_START, Engine, device_of, start

IDLE_POLL = 1000  # milliseconds
PEER_SECONDS = 10  # for the parent to notice that another rank has ended, and to end this one

log = logging.getLogger(__name__)


def run_rank(config: Config, rank: int, run_folder: str) -> None:
    """A rank from start to kill. Exits with 1 and one line if it cannot start."""
    logging.basicConfig(level=config.server.log_level.upper(), format=f"%(levelname)s rank {rank}: %(message)s")
    try:
        config = with_demo_folder(config)
        device = device_of(config, rank)
        ranks = Ranks(rank, config.tp, Path(run_folder))
        engine = start(config, ranks, device)
        channel = StepChannel(ranks, engine.buffers.max_words, Path(run_folder))
    except CANNOT_START as error:
        log.error("cannot start: %s", error)
        sys.exit(1)
    except Exception:
        _await_end(config)
        raise
    try:
        if rank == 0:
            _lead(engine, channel, run_folder)
        else:
            _follow(engine, channel)
    except Exception:
        _await_end(config)
        raise


def _await_end(config: Config) -> None:
    """Time to be ended: where another rank has died, that is the cause of the error here, and the parent's to tell."""
    if config.tp > 1:
        time.sleep(PEER_SECONDS)


def _lead(engine: Engine, channel: StepChannel, run_folder: str) -> None:
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(f"ipc://{run_folder}/requests")
    outbox.connect(f"ipc://{run_folder}/reports")
    encode, decoder = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder[ToEngine](ToEngine)

    def publish(message: FromEngine) -> None:
        outbox.send(encode(message))

    core = engine.core(publish, channel.send if engine.ready.tp > 1 else None)
    publish(engine.ready)
    while True:
        if not core.turn():
            publish(StepReport([], core.stats()))
            while not inbox.poll(IDLE_POLL):
                pass
        while inbox.poll(0):
            core.handle(decoder.decode(inbox.recv()))


def _follow(engine: Engine, channel: StepChannel) -> None:
    buffers = engine.buffers
    stagings = (buffers.staging(), buffers.staging())
    waits: list[Callable[[], None]] = [lambda: None, lambda: None]
    turn = 0
    while True:
        waits[turn]()  # the step before the last has left this staging
        bucket = buffers.buckets.all[channel.receive(stagings[turn].words.numpy())]
        waits[turn] = engine.steps.launch(bucket, stagings[turn])
        turn = 1 - turn
