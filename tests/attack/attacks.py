"""What hostile clients send, drawn from a seed, and what a server must be like afterwards.

`make attack` runs this for minutes and `make soak` beside honest traffic for as long as wanted; `make test` for
seconds. Every finding is one line; none is what is wanted.
"""

import json
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
import psutil

from tests.served import Served

ROUTES = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
]
FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "stop",
    "stream",
    "stream_options",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "echo",
    "stop_token_ids",
    "ignore_eos",
    "tokens",
    "role",
    "content",
    "type",
    "text",
    "name",
    "function",
    "parameters",
    "properties",
    "items",
    "$ref",
    "anyOf",
    "enum",
    "id",
    "arguments",
    "tool_calls",
    "tool_call_id",
    "system",
    "thinking",
    "reasoning",
    "reasoning_effort",
    "input_schema",
    "cache_salt",
    "metadata",
    "stop_sequences",
    "input",
    "tool_use_id",
]
WORDS = [
    *FIELDS,
    "",
    "demo",
    "user",
    "assistant",
    "tool",
    "auto",
    "function",
    "object",
    "string",
    "<|end|>",
    "a" * 5000,
]
WORDS += ["中" * 999, "\x00", "\ud7ff", "f\n", "#/", "[" * 500, "text", "low", "tool_result", "tool_use", "required"]
NUMBERS = [0, 1, -1, 2, 7, 0.5, -0.0, 1e-45, 1e308, 2**31, 2**63, -(2**63), 200002, 201088, 10**30]
HONEST = {"model": "demo", "max_tokens": 24}
ANSWER_SECONDS = 60
GROWTH_FILES = 8  # descriptors that a server may have more of than before


def value(draw: random.Random, depth: int = 0) -> object:
    """Any JSON."""
    kind = draw.random()
    if depth > 5 or kind < 0.25:
        return draw.choice(WORDS)
    if kind < 0.45:
        return draw.choice(NUMBERS)
    if kind < 0.55:
        return draw.choice([None, True, False])
    if kind < 0.75:
        return [value(draw, depth + 1) for _ in range(draw.choice([0, 1, 2, 9]))]
    return {draw.choice(WORDS): value(draw, depth + 1) for _ in range(draw.choice([0, 1, 3, 6]))}


def body(draw: random.Random) -> bytes:
    """A body that is nearly right, or not at all."""
    user = {"role": "user", "content": "Hello"}
    fields: dict[str, object] = {"max_tokens": 4, "prompt": "Hello", "messages": [user], "tokens": [1, 2, 3]}
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        place = draw.choice([fields, fields, user])
        place[draw.choice(FIELDS)] = value(draw)
    for name in draw.sample(sorted(fields), draw.choice([0, 0, 1])):
        del fields[name]
    data = json.dumps(fields, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        cut = draw.randrange(len(data))
        data = data[:cut] + draw.randbytes(draw.choice([0, 1, 20])) + data[cut:][draw.choice([0, 1, 50]) :]
    return data


def raw(draw: random.Random) -> bytes:
    """Bytes that are nearly a request, or several."""
    content = body(draw)
    line = f"{draw.choice(['POST', 'GET', 'HEAD', 'PUT', 'OPTIONS'])} {draw.choice([*ROUTES, '/health', '*', '//'])}"
    head = f"{line} HTTP/{draw.choice(['1.1', '1.1', '1.0', '2.0', '9'])}\r\nHost: x\r\n"
    head += draw.choice(["", "Connection: close\r\n", "Expect: 100-continue\r\n", "Upgrade: websocket\r\n", "a" * 999])
    head += draw.choice(["X: " + "x" * 70_000 + "\r\n", "X: y\r\n" * 101, "", "", ""])
    length = draw.choice([len(content), len(content), 0, -1, 10**12, len(content) // 2])
    head += draw.choice(
        [f"Content-Length: {length}\r\n", f"Content-Length: {length}\r\n", "Transfer-Encoding: chunked\r\n"]
    )
    data = head.encode() + b"\r\n" + content
    if draw.random() < 0.3:
        position = draw.randrange(len(data))
        data = data[:position] + draw.randbytes(4) + data[position + draw.choice([0, 4]) :]
    return data * draw.choice([1, 1, 1, 2, 12])


class Attack:
    """Attacks on one running server. `findings` has a line for each thing that must not be."""

    def __init__(self, server: Served, seed: int) -> None:
        self.server, self.seed = server, seed
        self.findings: list[str] = []
        self.sent = 0
        self.slowest_health = 0.0  # seconds
        self._before = self._resources()

    def bodies(self, seconds: float) -> None:
        """Structured bodies to all routes; no answer may be a 500, none may be missing."""

        def one(draw: random.Random, client: httpx.Client) -> None:
            route, data = draw.choice(ROUTES), body(draw)
            headers = {"content-type": "application/json"}
            answer = client.post(self.server.url + route, content=data, headers=headers)
            if answer.status_code >= 500 or "internal error" in answer.text:
                self.findings.append(f"{answer.status_code} from {route} for {data[:500]!r}: {answer.text[:200]}")

        def client(draw: random.Random, until: float) -> None:
            with httpx.Client(timeout=ANSWER_SECONDS) as http:
                while time.monotonic() < until:
                    self.sent += 1
                    one(draw, http)

        self._together(client, seconds)

    def sockets(self, seconds: float) -> None:
        """Raw bytes, cut anywhere, then closed, half closed or left."""

        def client(draw: random.Random, until: float) -> None:
            while time.monotonic() < until:
                self.sent += 1
                with suppress(OSError), self._connect() as connection:  # a connection that the server closed, too
                    connection.settimeout(draw.choice([0.01, 0.3]))
                    data = raw(draw)
                    connection.sendall(data[: draw.choice([len(data), draw.randrange(len(data))])])
                    if draw.random() < 0.3:
                        connection.shutdown(socket.SHUT_WR)
                    if draw.random() < 0.7:
                        connection.recv(65536)

        self._together(client, seconds)

    def floods(self, seconds: float) -> None:
        """Many half requests held at once, and clients that never read; the server answers others meanwhile."""
        long = json.dumps({"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 4}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        held: list[socket.socket] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for data in (b"GET /v1/mo", head % 10**6 + b"{" * 50_000, head % len(long) + long):
                self.sent += 1
                with suppress(ConnectionError, TimeoutError):
                    held.append(self._connect())
                    held[-1].sendall(data)
            answer = httpx.get(f"{self.server.url}/health", timeout=ANSWER_SECONDS)
            self.slowest_health = max(self.slowest_health, answer.elapsed.total_seconds())
            if answer.status_code != 200:
                self.findings.append(f"/health: {answer.status_code} while {len(held)} connections are held")
            if len(held) > 300:
                held.pop(0).close()
            time.sleep(0.01)
        for connection in held:
            connection.close()

    def aftermath(self) -> None:
        """An honest request is answered, nothing runs, and files and processes are as many as before."""
        answer = self.server.complete(prompt="The capital of France is")
        if answer.status_code != 200:
            self.findings.append(f"afterwards an honest request gets {answer.status_code}: {answer.text[:200]}")
        end = time.monotonic() + 30
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.1)
        self.findings += left

    def _left(self) -> list[str]:
        text = httpx.get(f"{self.server.url}/metrics", timeout=ANSWER_SECONDS).text
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        left = [f"afterwards {name} is {used}" for name in names if (used := gauge(text, name))]
        for name, count in self._resources().items():
            if count > self._before[name] + (GROWTH_FILES if "files" in name else 0):
                left.append(f"afterwards {name}: {count}, before {self._before[name]}")
        return left

    def _resources(self) -> dict[str, int]:
        process = psutil.Process(self.server.process.pid)
        return {
            "open files": process.num_fds(),
            "processes": len(process.children(recursive=True)),
            "connections": sum(entry.status == "ESTABLISHED" for entry in process.net_connections()),
        }

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=5)

    def _together(self, client: Callable[[random.Random, float], None], seconds: float, clients: int = 4) -> None:
        """Run several clients at once, each with draws of its own; an exception of one is a finding."""

        def run(number: int) -> None:
            try:
                client(random.Random(self.seed * 1000 + number), time.monotonic() + seconds)
            except Exception as error:
                self.findings.append(f"{client.__qualname__}: {error!r}")

        threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def gauge(text: str, name: str) -> float:
    """A figure of /metrics."""
    match = re.search(rf"^mini_vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    assert match, name
    return float(match[1])


def signals(seed: int) -> list[str]:
    """A server that gets signals at random moments of its start, service and end: what is wrong with how it ended."""
    draw = random.Random(seed)
    findings = []
    with Served("kernels.device=cpu", "tp=2", "server.drain_seconds=2") as server:
        time.sleep(draw.uniform(0, 12))
        parent = psutil.Process(server.process.pid)
        children = parent.children(recursive=True)
        sent = [draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGKILL])]
        server.process.send_signal(sent[0])
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, 0.5))
            sent.append(draw.choice([signal.SIGTERM, signal.SIGKILL]))
            server.process.send_signal(sent[1])
        output, _ = server.process.communicate(timeout=60)
        names = " and ".join(number.name for number in sent)
        if server.process.returncode not in (0, 1, *(-number for number in sent)):
            findings.append(f"{names}: exit status {server.process.returncode}")
        if "Traceback" in output or "ERROR" in output:
            findings.append(f"{names}: {output[-1000:]}")
        _, alive = psutil.wait_procs(children, timeout=10)
        findings += [f"{names}: {process} is left" for process in alive]
    return findings
