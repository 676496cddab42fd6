"""`make attack`: all attacks for some minutes, and a report. `make soak`: with honest traffic, memory at both ends.

Exit status 1 where there is a finding.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil

from tests.attack.attacks import HONEST, Attack, signals
from tests.served import Served

QUESTION = {**HONEST, "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
WARM_SECONDS = 60  # of a soak, before memory counts
GROWTH = 0.10  # of a process's memory, over a soak


def serve(log: Path) -> Served:
    return Served("kernels.device=cpu", "server.receive_timeout=5", log=log).wait_ready()


def attack(minutes: float) -> list[str]:
    """A third of the time each for bodies, sockets and floods; then signals to ten servers."""
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "log") as server:
        attack = Attack(server, seed=int(time.time()))
        for kind in (attack.bodies, attack.sockets, attack.floods):
            kind(minutes * 20)
            print(f"{kind.__name__}: {attack.sent} requests so far, {len(attack.findings)} findings", flush=True)
        attack.aftermath()
        print(f"slowest /health during floods: {1000 * attack.slowest_health:.0f} ms")
        findings = attack.findings + complaints(Path(folder) / "log")
    for round in range(10):
        findings += signals(round)
    return findings


def soak(minutes: float) -> list[str]:
    """Honest questions beside attacks; the answers stay right, and memory, files and pages as they were."""
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "log") as server:
        attack, end, first = Attack(server, seed=1), time.monotonic() + 60 * minutes, {}

        def ask() -> None:
            while time.monotonic() < end:
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=QUESTION, timeout=120)
                if answer.status_code != 200 or "Paris" not in answer.text:
                    findings.append(f"a question got {answer.status_code}: {answer.text[:200]}")

        asking = threading.Thread(target=ask)
        asking.start()
        while time.monotonic() < end:
            for kind in (attack.bodies, attack.sockets):
                kind(max(0.0, min(10.0, end - time.monotonic())))
            if not first and time.monotonic() > end - 60 * minutes + WARM_SECONDS:
                first = memory(server)
        asking.join()
        attack.aftermath()
        last = memory(server)
        print(
            "MiB of each process:",
            [size >> 20 for size in (first or last).values()],
            "->",
            [s >> 20 for s in last.values()],
        )
        findings += [
            f"{pid} grew to {last[pid]} bytes" for pid, size in first.items() if last[pid] > size * (1 + GROWTH)
        ]
        return findings + attack.findings + complaints(Path(folder) / "log")


def memory(server: Served) -> dict[int, int]:
    """Resident bytes by process."""
    process = psutil.Process(server.process.pid)
    return {one.pid: one.memory_info().rss for one in (process, *process.children(recursive=True))}


def complaints(log: Path) -> list[str]:
    """Lines of the log that no client may cause."""
    return [
        f"log: {line}" for line in log.read_text().splitlines() if line.startswith(("ERROR", "CRITICAL", "Traceback"))
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--soak", action="store_true")
    arguments = parser.parse_args()
    found = (soak if arguments.soak else attack)(arguments.minutes)
    print(*found, f"{len(found)} findings", sep="\n")
    sys.exit(bool(found))
