"""How many tokens a second the HTTP path carries: `python -m tests.bench_http`.

A server over the fake engine runs in a process of its own; the client counts events and discards them. Every Delta
brings `--step` tokens; with 1, the worst case, each token is an event of its own. Prints the median of several runs.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time

import uvicorn

from conf.schema import ServerConfig
from serve.app import create_app
from serve.connection import protocol_of
from serve.workers import Workers
from sweep import load
from sweep.client import http_sender
from sweep.workload import Request
from tests.fakes import FakeEngine

TOKENS = 256
REASONING = 64
ENDS = (b"[DONE]", b"event: response.incomplete")  # of a stream: of the older endpoints, of Responses


def serve(listener: socket.socket, step: int) -> None:
    script = [200005, 35644, 200008, *range(1000, 1000 + REASONING), 200007]
    script += [200006, 173781, 200005, 17196, 200008]
    script += [2000 + i for i in range(TOKENS - len(script))]
    engine = FakeEngine(script, max_context=4096)
    engine.step = step
    app = create_app(engine, ServerConfig(), "bench", Workers())
    config = uvicorn.Config(app, loop="uvloop", http=protocol_of(ServerConfig()), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


async def stream(port: int, request: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    received = 0
    tail = b""
    while block := await reader.read(262144):
        received += block.count(b"data: ")
        new = tail + block
        if any(end in new for end in ENDS):
            writer.close()
            return received
        tail = new[-64:]
    raise SystemExit(f"a stream ended early: {tail!r}")


async def measure(port: int, path: str, body: dict, streams: int) -> tuple[float, float]:
    """(seconds, events) of `streams` requests at once."""
    payload = json.dumps({**body, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
    start = time.perf_counter()
    events = await asyncio.gather(*(stream(port, head + payload) for _ in range(streams)))
    return time.perf_counter() - start, sum(events)


async def sweep_client(port: int, streams: int) -> float:
    """Seconds of as many requests by the sweep's own client, which decodes every event."""
    async with http_sender(f"http://127.0.0.1:{port}", "bench", 1.0) as send:
        requests = [Request([1], TOKENS, seed) for seed in range(streams)]
        run = await load.closed(send, requests, streams, 600, 600, lambda record: None)
    if errors := [record.error for record in run.records if record.error]:
        raise SystemExit(f"a stream failed: {errors[0]}")
    return max(record.arrivals[-1] for record in run.records) - run.begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--step", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    cases = {
        "/v1/completions": {"prompt": "Hello", "max_tokens": TOKENS},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": TOKENS},
        "/v1/responses": {"input": "Hello", "max_output_tokens": TOKENS},
    }
    for step in options.step:
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        process = multiprocessing.get_context("fork").Process(target=serve, args=(listener, step), daemon=True)
        process.start()
        port = listener.getsockname()[1]
        for path, body in cases.items():
            asyncio.run(measure(port, path, body, 4))  # warm
            runs = [asyncio.run(measure(port, path, body, options.streams)) for _ in range(options.runs)]
            seconds = statistics.median(run[0] for run in runs)
            tokens = options.streams * TOKENS
            print(
                f"{path:22} {options.streams} streams, {step} tokens a Delta: {tokens / seconds:9,.0f} tokens/s, "
                f"{1e6 * seconds / tokens:6.1f} µs a token, {runs[-1][1] / options.streams:.0f} events a stream"
            )
        start = time.process_time()
        runs = [asyncio.run(sweep_client(port, options.streams)) for _ in range(options.runs)]
        cost = (time.process_time() - start) / options.runs / tokens
        print(
            f"{'client of sweep/':22} {options.streams} streams, {step} tokens a Delta: "
            f"{tokens / statistics.median(runs):9,.0f} tokens/s, {1e6 * cost:6.1f} µs of its own a token"
        )
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
