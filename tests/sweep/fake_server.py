"""Stands in for `serve.py`: the real HTTP server over the faked engine, well or ill by server.max_queue."""

import os
import sys
import time

import msgspec
import uvicorn

from conf.schema import ServerConfig
from engine.messages import BucketStats, Stats
from serve.app import create_app
from serve.workers import Workers
from tests.fakes import FakeEngine, FakeStream

WELL, DOES_NOT_START, CRASHES, HANGS, ANSWERS_WRONGLY, IS_SLOW = range(1024, 1030)
GATE_PROMPTS = 4


class Engine(FakeEngine):
    def __init__(self, kind):
        tokens = range(5000, 6000) if kind == ANSWERS_WRONGLY else range(1000, 2000)
        super().__init__(list(tokens), max_context=4096)
        self.kind = kind
        self.ready = msgspec.structs.replace(self.ready, phases={"capture": 0.25}, memory={"pages": 2**20})

    def submit(self, prompt, sampling, salt):
        stream = super().submit(prompt, sampling, salt)
        answered = len(self.submitted) - GATE_PROMPTS
        self.stats = Stats(
            prefix_query_tokens=100 * answered,
            prefix_hit_tokens=25 * answered,
            buckets=[BucketStats("decode", 4, 10 * answered, 30 * answered, 10 * answered)],
        )
        if self.kind == CRASHES and answered > 0:
            print("CRITICAL rank 0 ended with signal SIGKILL: the server stops", flush=True)
            os._exit(1)
        if (self.kind == HANGS and answered > 0) or (self.kind == IS_SLOW and answered > 10):
            self.delay = 1000.0
        return stream


def unlikely(stream, tokens, original=FakeStream._logprobs):
    entries = original(stream, tokens)
    return entries and [msgspec.structs.replace(entry, logprob=-3.0) for entry in entries]


def main():
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    kind = int(given.get("server.max_queue", WELL))
    with open(os.environ["FAKE_SERVERS"], "a") as file:
        print(os.getpid(), kind, file=file)
    if kind == DOES_NOT_START:
        time.sleep(0.2)
        print("Traceback (most recent call last):\nERROR rank 0: cannot start: out of memory", flush=True)
        sys.exit("ERROR the server stops\nand this is its last line")
    engine = Engine(kind)
    if kind == ANSWERS_WRONGLY:
        FakeStream._logprobs = unlikely
    app = create_app(engine, ServerConfig(), "demo", Workers())
    uvicorn.run(app, host="127.0.0.1", port=int(given["server.port"]), log_level="error")


if __name__ == "__main__":
    main()
