"""Full, draining, starting, failing, slow; and clients that go away."""

import asyncio
import json
import logging
import socket
import subprocess
import sys

import pytest

from serve.client import EngineFailed
from tests.fakes import FakeEngine
from tests.serve.conftest import Live

ROUTES = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}
ONE_CHOICE = "/v1/responses"  # has no n
MANY = [1000 + i for i in range(200)]


def each(live: Live, **body: object) -> list:
    """The answers of all routes."""
    return [live.http.post(path, json=given | body) for path, given in ROUTES.items()]


def last_event(text: str) -> dict | str:
    last = text.strip().split("\n\n")[-1].split("data: ")[-1]
    return last if last == "[DONE]" else json.loads(last)


def told_error(text: str) -> str:
    """The message of the error with which a stream ends."""
    last = last_event(text)
    return last.get("response", last)["error"]["message"]


def choices(path: str, n: int) -> int:
    return 1 if path == ONE_CHOICE else n


def test_serve_never_imports_torch():
    code = "import sys, serve.app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_healthy_server_is_healthy_and_ready(serve):
    live = serve(FakeEngine([1]))
    assert live.http.get("/health").status_code == live.http.get("/health/ready").status_code == 200
    assert "version" in live.http.get("/version").json()


@pytest.mark.parametrize("state", ["starting", "draining", "failed"])
def test_a_server_that_cannot_take_requests_says_so_and_when_to_come_back(serve, state):
    live = serve(FakeEngine([1]))
    if state == "starting":
        live.engine.ready = None
    elif state == "draining":
        live.app.state.draining = True
    else:
        live.engine.failure = "rank 3 died"
    for response in (*each(live), *each(live, stream=True), live.http.get("/health/ready")):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
    health = live.http.get("/health")
    assert health.status_code == (503 if state == "failed" else 200)
    assert ("rank 3 died" in health.text) == (state == "failed")
    assert live.engine.submitted == []


def test_a_full_queue_answers_429_and_counts_every_choice(serve):
    live = serve(FakeEngine([1, 200002]), max_queue=3)
    for path, body in ROUTES.items():
        live.engine.running = set(range(100, 104 - choices(path, 4)))
        response = live.http.post(path, json=body | {"n": 4})
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) > 0
    live.engine.running = {100}
    assert live.complete(prompt=["a", "b", "c"]).status_code == 429
    assert live.complete(n=2).status_code == 200


def test_requests_in_flight_finish_while_draining(serve):
    engine = FakeEngine(MANY)
    engine.delay = 0.002
    live = serve(engine)
    body = {"prompt": "x", "stream": True, "max_tokens": 50}
    with live.http.stream("POST", "/v1/completions", json=body) as response:
        text = iter(response.iter_text())
        text_so_far = next(text)
        live.app.state.draining = True
        text_so_far += "".join(text)
    assert last_event(text_so_far) == "[DONE]"


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_that_takes_too_long_ends_with_an_error(serve, n):
    engine = FakeEngine(MANY)
    engine.delay = 0.05
    live = serve(engine, request_timeout=0.1)
    for response in each(live, n=n, max_tokens=100):
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
    for response in each(live, n=n, max_tokens=100, stream=True):
        assert response.status_code == 200
        assert "longer than 0.1 s" in told_error(response.text)
        assert "[DONE]" not in response.text
    assert sorted(engine.aborted) == list(range(2 * sum(choices(path, n) for path in ROUTES)))
    assert engine.running == set()


@pytest.mark.parametrize(
    ("broken", "status", "says"),
    [("out of pages", 500, "out of pages"), (EngineFailed("rank 1 died"), 503, "rank 1 died")],
)
@pytest.mark.parametrize("n", [1, 2])
def test_an_engine_error_midway_is_told_to_the_client(serve, broken, status, says, n):
    engine = FakeEngine(MANY)
    engine.break_after, engine.broken = 3, broken
    live = serve(engine)
    for response in each(live, n=n):
        assert response.status_code == status
        assert says in response.json()["error"]["message"]
    for response in each(live, n=n, stream=True):
        assert says in told_error(response.text)
        assert "[DONE]" not in response.text
    assert engine.running == set()


def test_an_unexpected_exception_in_a_stream_is_logged_and_not_told(serve, caplog):
    engine = FakeEngine(MANY)
    engine.break_after, engine.broken = 3, KeyError("secret detail")
    live = serve(engine)
    with caplog.at_level(logging.ERROR, "serve"):
        responses = each(live, stream=True)
    for response in responses:
        assert told_error(response.text) == "internal error"
        assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_an_engine_that_fails_at_submission_answers_503(serve):
    live = serve(FakeEngine([1]))

    def submit(prompt, sampling, salt):
        raise EngineFailed("just now")

    live.engine.submit = submit
    assert [response.status_code for response in each(live)] == [503] * len(ROUTES)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("silent", [True, False])
def test_a_client_that_goes_away_aborts_its_request(serve, path, stream, n, silent):
    """Whether tokens are flowing or none has come yet."""
    engine = FakeEngine(lambda prompt, sampling: MANY * 100, max_context=20_000)
    engine.delay = 0.005
    engine.hold = asyncio.Event() if silent else None
    live = serve(engine)
    n = choices(path, n)
    body = json.dumps({**ROUTES[path], "stream": stream, "n": n, "max_tokens": 15_000}).encode()
    client = socket.create_connection(("127.0.0.1", live.port))
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    live.eventually(lambda: len(engine.submitted) == n)
    if stream:
        client.recv(100)
    assert engine.aborted == []
    client.close()
    live.eventually(lambda: sorted(engine.aborted) == list(range(n)))
    assert engine.running == set()


def test_a_client_that_goes_away_with_half_its_body_sent_leaves_no_trace(serve, caplog):
    live = serve(FakeEngine([1]))
    with caplog.at_level(logging.ERROR):
        client = socket.create_connection(("127.0.0.1", live.port))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        client.close()
        assert live.complete().status_code == 200
    assert caplog.text == ""
