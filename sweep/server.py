"""The real server as a subprocess: start, wait until ready, scrape, stop.

Knows serve.py's command line and /metrics; nothing of loads.
"""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
PREFIX = "mini_vllm:"
STOP_SECONDS = 10  # between the signal that asks and the one that does not

Samples = dict[tuple[str, ...], float]  # (name without prefix, further labels' values) -> value


class ServerFailed(RuntimeError):
    """A server that did not start, or ended; the message has its own last words."""


class Server:
    """One server in a session of its own, so that a Ctrl-C at the terminal reaches only the sweep, which stops it."""

    def __init__(self, command: tuple[str, ...], overrides: list[str], log: Path) -> None:
        self.log = log
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        address = ["server.host=127.0.0.1", f"server.port={self._port}"]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*command, *overrides, *address],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, seconds: float) -> float:
        """Seconds until it accepted requests. Raises ServerFailed where it ends or takes longer than `seconds`."""
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            self.check()
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return time.monotonic() - begun
            time.sleep(0.1)
        raise ServerFailed(f"not ready after {seconds:g} s; {self._last_words()}")

    def check(self) -> None:
        """Raises ServerFailed if it has ended, or says that it cannot go on."""
        if (status := self._process.poll()) is not None:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise ServerFailed(f"the server ended with {how}; {self._last_words()}")

    def scrape(self) -> Samples:
        """Counters and gauges. Raises ServerFailed where there is no answer."""
        try:
            text = httpx.get(f"{self.url}/metrics", timeout=30).text
        except httpx.HTTPError as error:
            self.check()
            raise ServerFailed(f"/metrics does not answer: {error}") from error
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [value for name, value in sample.labels.items() if name != "model_name"]
                found[sample.name.removeprefix(PREFIX), *labels] = sample.value
        return found

    def stop(self) -> None:
        """Ask, wait, then kill the server and its ranks. Nothing is left behind."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        """The log's last error, or its last line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|CRITICAL|configuration:)|\w*(Error|Exception):", line)]
        return f"{(errors or lines or ['it said nothing'])[-1].strip()} ({self.log.name})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
