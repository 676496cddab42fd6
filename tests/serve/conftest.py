"""A real server on a real socket, with the fake engine behind it."""

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import settings

from conf.schema import ServerConfig
from engine.tokenizer import Tokenizer
from serve.app import create_app
from serve.connection import protocol_of
from serve.harmony import Parser, Segment
from serve.workers import Workers
from tests.fakes import FakeEngine

# A busy machine makes no example wrong.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

MODEL = "gpt-oss-test"
TODAY = datetime.date(2025, 6, 28)


@dataclass
class Live:
    port: int
    app: FastAPI
    engine: FakeEngine
    http: httpx.Client

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def complete(self, **body: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "Hello", **body})

    def chat(self, **body: object) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}], **body})

    def eventually(self, holds: Callable[[], bool]) -> None:
        """Waits up to 5 s for what the server does after the client has left."""
        end = time.monotonic() + 5
        while not holds():
            assert time.monotonic() < end, "it never came about"
            time.sleep(0.005)


def parse(tokens: Iterable[int], tokenizer: Tokenizer, functions: Iterable[str] = ()) -> list[tuple[Segment, str]]:
    """All messages of a finished output, those without text left out."""
    parser = Parser(tokenizer, functions=functions)
    messages: list[tuple[Segment, str]] = []
    for event in [*map(parser.feed, tokens), parser.finish()]:
        if event and event.text:
            if messages and messages[-1][0] is event.segment:
                messages[-1] = (event.segment, messages[-1][1] + event.text)
            else:
                messages.append((event.segment, event.text))
    return messages


Serve = Callable[..., Live]


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    workers = Workers(1, 1)
    yield workers
    workers.close()


@pytest.fixture
def serve(workers: Workers) -> Iterator[Serve]:
    """serve(engine, **server configuration) -> a running server."""
    with contextlib.ExitStack() as running:

        def start(engine: FakeEngine, **server: object) -> Live:
            configured = ServerConfig(**server)
            app = create_app(engine, configured, MODEL, workers, today=lambda: TODAY)
            listener = socket.create_server(("127.0.0.1", 0))
            runner = uvicorn.Server(
                uvicorn.Config(app, http=protocol_of(configured), log_level="critical", timeout_graceful_shutdown=1)
            )
            thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            port = listener.getsockname()[1]
            http = running.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))

            def stop() -> None:
                runner.should_exit = True
                thread.join()

            running.callback(stop)
            while not runner.started:
                time.sleep(0.002)
            return Live(port, app, engine, http)

        yield start


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="session")
def harmony(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text with control tokens spelled out -> ids, as a model would generate them."""
    return lambda text: tokenizer.encoding.encode(text, allowed_special="all")
