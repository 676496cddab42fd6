"""A server in a process of its own, started as a user starts it."""

import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import httpx
import psutil

from engine.lifetime import dying_with_parent

ROOT = Path(__file__).parents[1]
START_SECONDS = 120
GREEDY = {"model": "demo", "prompt": [1, 2, 3], "temperature": 0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    def __init__(self, *arguments, log=None):
        """`log`: a file for its output, which is otherwise `process.stdout`."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("w") if log else nullcontext(subprocess.PIPE) as output:
            self.process = subprocess.Popen(
                [sys.executable, "serve.py", f"server.port={self.port}", *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=dying_with_parent(),
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def wait_ready(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return self
            except httpx.ConnectError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready: {self.process.stdout.read() if self.process.poll() is not None else 'slow'}")

    def ranks(self):
        """The rank processes, in order."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "run_rank" in " ".join(child.cmdline())]

    def complete(self, **body):
        body = GREEDY | {"max_tokens": 8, "return_token_ids": True} | body
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
