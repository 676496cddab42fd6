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

from engine.lifetime import dying_with_parent

ROOT = Path(__file__).parents[1]
PREFIX = "mini_vllm:"
STOP_SECONDS = 10  # between SIGTERM and SIGKILL

Samples = dict[tuple[str, ...], float]  # (name without prefix, values of labels but model_name) -> value


class ServerFailed(RuntimeError):
    """A server that did not start, or ended; the message quotes the first error of its log."""


class Server:
    """One server process, in a session of its own: a Ctrl-C at the terminal reaches only the sweep, which stops it.

    It is killed with the thread that started it.
    """

    def __init__(self, command: tuple[str, ...], overrides: list[str], log: Path) -> None:
        """Start `command` with the overrides on a free port; its output goes to the file `log`."""
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
                preexec_fn=dying_with_parent(),
            )

    def wait_ready(self, seconds: float) -> float:
        """Seconds until it accepts requests. Raises ServerFailed if it ends or takes longer than `seconds`."""
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            self.check()
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return time.monotonic() - begin
            time.sleep(0.1)
        raise ServerFailed(f"not ready after {seconds:g} s; {self._first_error()}")

    def check(self) -> None:
        """Raises ServerFailed if the process has ended."""
        if (status := self._process.poll()) is not None:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise ServerFailed(f"the server ended with {how}; {self._first_error()}")

    def scrape(self) -> Samples:
        """The samples of /metrics. Raises ServerFailed if there is no answer."""
        try:
            text = httpx.get(f"{self.url}/metrics", timeout=30).text
        except httpx.HTTPError as error:
            self.check()
            raise ServerFailed(f"/metrics does not answer: {error}") from error
        samples: Samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [value for name, value in sample.labels.items() if name != "model_name"]
                samples[(sample.name.removeprefix(PREFIX), *labels)] = sample.value
        return samples

    def stop(self) -> None:
        """Send SIGTERM, wait, then kill the server and its ranks. No process is left behind."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _first_error(self) -> str:
        """The first error in the log, which those after it follow from, or else its last line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|CRITICAL|configuration:)|\w*(Error|Exception):", line)]
        line = errors[0] if errors else lines[-1] if lines else "its log is empty"
        return f"{line.strip()} ({self.log.name})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
