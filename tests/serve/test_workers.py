"""Large requests are prepared in processes of their own: the event loop goes on, and their end is not the server's."""

import asyncio
import json
import logging
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from engine.lifetime import Child
from serve.generation import INLINE_BYTES, RETRY
from serve.parsing import parse
from serve.protocol import ApiError, ChatRequest
from serve.workers import LARGE_BYTES, Workers
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL

LONG = "long " * INLINE_BYTES
MESSAGES = [{"role": "user", "content": LONG}]
SHORT = [{"role": "user", "content": "x"}]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "#"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
LARGE = {
    "/v1/completions": {"prompt": LONG},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": LONG},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": LONG},
    "/detokenize": {"tokens": [1000] * INLINE_BYTES},
}
SMALL = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": SHORT},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": SHORT, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": SHORT},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1000]},
}
BODIES = [(path, json.dumps(body)) for path, body in LARGE.items()]
# A kilobyte of tools may cost as much as a megabyte of text, however the field is spelled.
BODIES += [("/v1/chat/completions", json.dumps({"messages": SHORT, "tools": TOOLS}))]
BODIES += [("/v1/chat/completions", BODIES[-1][1].replace('"tools"', '"t\\u006fols"'))]


@contextmanager
def stopped(workers):
    """As long as this lasts, the workers get no further."""
    pids = workers.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGCONT)


@pytest.fixture
def live(serve, workers):
    """A server whose workers run."""
    workers.start()
    return serve(FakeEngine([1, 200002], max_context=50_000))


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[*LARGE, "tools", "tools spelled otherwise"])
def test_while_a_large_body_is_prepared_the_others_are_served(live, workers, path, body):
    with ThreadPoolExecutor(1) as pool:
        with stopped(workers):
            answer = pool.submit(live.http.post, path, content=body)
            for other, small in SMALL.items():
                assert live.http.post(other, json=small).status_code == 200
            assert live.http.get("/health").status_code == 200
            assert not answer.done()
        assert answer.result().status_code == 200


def test_a_body_is_refused_alike_wherever_it_is_read(live):
    given = {"messages": SHORT, "temperature": 9}
    small = live.http.post("/v1/chat/completions", json=given)
    large = live.http.post("/v1/chat/completions", json=given | {"user": LONG})
    assert small.status_code == large.status_code == 400
    assert small.json() == large.json()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_request_that_ends_its_worker_is_503_and_costs_no_other(live, workers, number):
    with pytest.raises(ApiError, match=number.name) as refused:
        asyncio.run(workers.run(1, signal.raise_signal, number))
    assert (refused.value.status, refused.value.code, refused.value.headers) == (503, "worker_ended", RETRY)
    assert live.http.post("/tokenize", json=LARGE["/tokenize"]).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_ends_before_it_has_a_request_costs_none(live, workers, number):
    with ThreadPoolExecutor(1) as pool, stopped(workers):
        answer = pool.submit(live.http.post, "/tokenize", json=LARGE["/tokenize"])
        live.eventually(lambda: workers.outstanding == 1)
        for pid in workers.pids:
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)
        assert answer.result().status_code == 200


def test_where_workers_end_at_their_start_requests_are_refused(live, workers, monkeypatch):
    monkeypatch.setattr("serve.workers.Child", lambda name, *_, files: Child(name, "os:abort", files=files))
    for pid in workers.pids:
        os.kill(pid, signal.SIGKILL)
    refused = live.http.post("/tokenize", json=LARGE["/tokenize"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_ended")
    assert "SIGABRT" in refused.json()["error"]["message"]


def test_a_client_that_goes_away_is_not_served(live, workers):
    body = json.dumps(LARGE["/v1/completions"]).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with stopped(workers):
        clients = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(4)]
        for client in clients:
            client.sendall(request)
        live.eventually(lambda: workers.outstanding == 4)
        for client in clients:
            client.close()
        live.eventually(lambda: workers.outstanding <= len(workers.pids))  # those in line have left it
    assert live.http.post("/v1/completions", json=LARGE["/v1/completions"]).status_code == 200
    assert len(live.engine.submitted) == 1


def test_bodies_count_as_in_flight_while_they_are_prepared(serve, workers):
    workers.start()
    live = serve(FakeEngine([1, 200002], max_context=50_000), max_bytes_in_flight=2 * len(LONG) - 100)
    with ThreadPoolExecutor(1) as pool:
        with stopped(workers):
            answer = pool.submit(live.http.post, "/tokenize", json={"prompt": LONG})
            live.eventually(lambda: workers.outstanding == 1)
            assert live.http.post("/tokenize", json={"prompt": LONG}).status_code == 503
        assert answer.result().status_code == 200
    assert live.http.post("/tokenize", json={"prompt": LONG}).status_code == 200


def test_what_a_function_raises_comes_back(workers):
    async def run():
        with pytest.raises(ApiError) as refused:
            await workers.run(0, parse, b'{"messages": 5}', ChatRequest)
        assert (refused.value.status, refused.value.param) == (400, "messages")
        with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
            await workers.run(0, int, "x")

    asyncio.run(run())


@pytest.fixture
def one():
    workers = Workers(1, 1)
    yield workers
    workers.close()


def test_a_worker_goes_on_after_a_failure_and_is_replaced_after_its_end(one, caplog):
    async def run():
        first = await one.run(0, os.getpid)
        with pytest.raises(RuntimeError):
            await one.run(0, int, "x")
        assert await one.run(0, os.getpid) == first != os.getpid()
        with caplog.at_level(logging.ERROR), pytest.raises(ApiError, match="exit status 3"):
            await one.run(0, os._exit, 3)
        assert caplog.messages == ["a worker ended with exit status 3; another is started"]
        assert await one.run(0, os.getpid) not in (first, os.getpid())
        assert len(one.pids) == 1

    asyncio.run(run())


def test_what_is_cancelled_before_its_turn_never_runs(one, tmp_path):
    async def run():
        first = asyncio.create_task(one.run(0, time.sleep, 0.2))
        second = asyncio.create_task(one.run(0, Path.touch, tmp_path / "ran"))
        await asyncio.sleep(0)
        second.cancel()
        await first
        await one.run(0, Path.touch, tmp_path / "last")

    asyncio.run(run())
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_small_requests_wait_for_no_large_one(one):
    async def run():
        large = [asyncio.create_task(one.run(LARGE_BYTES + 1, time.sleep, 3600)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await one.run(LARGE_BYTES, os.getpid) in one.pids
        one.close()
        await asyncio.gather(*large, return_exceptions=True)

    asyncio.run(run())


def test_closing_ends_the_processes_also_those_at_work(one):
    async def run():
        one.start()
        waits = asyncio.create_task(one.run(0, time.sleep, 3600))
        while not one.outstanding:
            await asyncio.sleep(0.01)
        pids = one.pids
        one.close()
        with pytest.raises(ApiError):
            await waits
        return pids

    assert [pid for pid in asyncio.run(run()) if psutil.pid_exists(pid)] == []


def test_a_workers_model_names_are_those_of_the_server(serve):
    live = serve(FakeEngine([1, 200002], max_context=50_000), also_named=["other"])
    for model, status in ((MODEL, 200), ("other", 200), ("third", 404)):
        assert live.http.post("/tokenize", json={"prompt": LONG, "model": model}).status_code == status
