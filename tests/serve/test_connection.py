"""What one connection may cost: heads, bodies and connections without end, and clients that stall or vanish."""

import json
import socket
import time
from contextlib import ExitStack, closing, suppress

import pytest

from serve import connection
from tests.fakes import FakeEngine

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"prompt": "x"}'
MANY = [1000 + i for i in range(200)]


def whole(body: bytes = BODY) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def connect(live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=10)


def rest(client: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while block := client.recv(65536):
            received += block
    return received


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def refusal(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return status(answer), json.loads(body)["error"]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET /" + b"x" * 17_000 + b" HTTP/1.1\r\n", 414),
        (b"GET /" + b"x" * 17_000, 414),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 66_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 300_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"x" * 300_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 102, 431),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n" + b"a: b\r\n" * 101, 431),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\na: " + b"x" * 300_000, 431),
        (b"what is this\r\n\r\n", 400),
    ],
    ids=["url", "open url", "value", "open value", "open name", "count", "trailers", "open trailer", "not http"],
)
def test_a_head_without_end_is_refused_before_any_handler(serve, sent, expected):
    live = serve(FakeEngine([1, 200002]))
    with closing(connect(live)) as client:
        client.sendall(sent)
        assert refusal(rest(client))[0] == expected
    assert live.engine.submitted == []
    assert live.complete().status_code == 200


def test_headers_within_the_limits_are_taken(serve):
    live = serve(FakeEngine([1, 200002]))
    many = {f"h{i}": "x" * 600 for i in range(90)}
    assert live.http.get("/v1/models", headers=many).status_code == 200


@pytest.mark.parametrize("sent", [b"GET / HT", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{", whole() + HEAD])
def test_a_request_that_does_not_arrive_is_ended(serve, sent):
    live = serve(FakeEngine([1, 200002]), receive_timeout=0.2)
    with closing(connect(live)) as client:
        client.sendall(sent)
        assert b"HTTP/1.1 408" in rest(client)
    assert live.engine.running == set()


def test_a_body_that_only_trickles_is_ended(serve):
    live = serve(FakeEngine([1, 200002]), receive_timeout=0.2)
    with closing(connect(live)) as client:
        client.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        client.settimeout(0.02)
        answer, end = b"", time.monotonic() + 10
        while not answer and time.monotonic() < end:
            client.sendall(b"x")
            with suppress(TimeoutError):
                answer = client.recv(1000)
    assert status(answer) == 408


def test_a_connection_on_which_nothing_is_asked_is_closed_without_a_word(serve):
    live = serve(FakeEngine([1, 200002]), receive_timeout=0.2)
    with closing(connect(live)) as client:
        assert rest(client) == b""


def test_bytes_in_flight_have_a_limit_and_are_given_back(serve):
    live = serve(FakeEngine([1, 200002]), max_body_bytes=1000, max_bytes_in_flight=1000)
    half = HEAD + b"Content-Length: 900\r\n\r\n" + b"x" * 600
    with closing(connect(live)) as first, closing(connect(live)) as second:
        first.sendall(half)
        live.eventually(lambda: live.http.get("/health").status_code == 200)
        time.sleep(0.05)
        second.sendall(half)
        code, error = refusal(rest(second))
        assert (code, error["code"]) == (503, "overloaded")
        assert live.http.get("/health").status_code == 200
    live.eventually(lambda: live.complete(prompt="x" * 700).status_code == 200)
    for _ in range(5):
        assert live.complete(prompt="x" * 700).status_code == 200


def test_connections_have_a_limit_beyond_which_health_and_metrics_are_answered(serve):
    live = serve(FakeEngine([1, 200002]), max_connections=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(closing(connect(live))).sendall(HEAD)
        for path, expected in (("/v1/models", 503), ("/health", 200), ("/health/ready", 200), ("/metrics", 200)):
            with closing(connect(live)) as client:
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert status(rest(client)) == expected, path
    live.eventually(lambda: live.http.get("/v1/models").status_code == 200)


def test_beyond_the_reserve_connections_are_closed(serve):
    live = serve(FakeEngine([1, 200002]), max_connections=2)
    with ExitStack() as stack:
        for _ in range(2 + connection.RESERVED):
            stack.enter_context(closing(connect(live))).sendall(HEAD)
        last = stack.enter_context(closing(connect(live)))
        assert rest(last) == b""


def test_an_unused_connection_makes_room_for_a_new_one(serve):
    live = serve(FakeEngine([1, 200002]), max_connections=2)
    with ExitStack() as stack:
        for _ in range(6):
            client = stack.enter_context(closing(connect(live)))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while b"max_model_len" not in answer:
                answer += client.recv(65536)
            assert answer.count(b"HTTP/1.1 200") == 2


def test_pipelined_requests_are_answered_in_order(serve):
    live = serve(FakeEngine(lambda prompt, sampling: prompt))
    bodies = [json.dumps({"prompt": [i], "return_token_ids": True}).encode() for i in range(5)]
    with closing(connect(live)) as client:
        client.sendall(b"".join(whole(body) for body in bodies) + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = rest(client)
    places = [answer.index(b'"token_ids":[%d]' % i) for i in range(5)]
    assert places == sorted(places)


def test_pipelined_requests_have_a_limit(serve):
    engine = FakeEngine(MANY)
    engine.delay = 0.05
    live = serve(engine)
    with closing(connect(live)) as client:
        client.sendall(whole() * (connection.MAX_PIPELINED + 2))
        assert rest(client) == b""
    live.eventually(lambda: engine.running == set())


@pytest.mark.parametrize("stream", [True, False])
def test_a_pipelined_request_hides_no_disconnect(serve, caplog, stream):
    engine = FakeEngine(lambda prompt, sampling: MANY * 100, max_context=20_000)
    engine.delay = 0.005
    live = serve(engine)
    body = json.dumps({"prompt": "x", "max_tokens": 15_000, "stream": stream}).encode()
    with closing(connect(live)) as client:
        client.sendall(whole(body))
        live.eventually(lambda: len(engine.submitted) == 1)
        client.sendall(whole(body))
        time.sleep(0.1)
    live.eventually(lambda: engine.aborted == [0])
    time.sleep(0.1)
    assert len(engine.submitted) == 1  # the second never starts
    assert caplog.text == ""


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_never_reads_is_closed_at_the_deadline(serve, monkeypatch, stream):
    monkeypatch.setattr(connection, "LATE_SECONDS", 0.2)
    engine = FakeEngine(lambda prompt, sampling: MANY * 2000, max_context=500_000)
    engine.step = 1000
    live = serve(engine, request_timeout=2.0)
    body = json.dumps({"prompt": "x", "max_tokens": 400_000, "stream": stream, "logprobs": 20}).encode()
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", live.port))
        client.settimeout(10)
        client.sendall(whole(body))
        live.eventually(lambda: len(engine.submitted) == 1)
        live.eventually(lambda: engine.running == set())
        if stream:
            time.sleep(2)
            assert not rest(client).endswith(b"0\r\n\r\n")  # the end had not been written


def test_an_answer_is_sent_to_a_client_that_sends_no_more(serve):
    engine = FakeEngine([1, 2, 3, 200002])
    engine.delay = 0.02
    live = serve(engine)
    with closing(connect(live)) as client:
        client.sendall(whole())
        client.shutdown(socket.SHUT_WR)
        answer = rest(client)
    assert status(answer) == 200
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 4


def test_a_refusal_of_a_request_that_waits_to_be_continued_is_the_only_answer(serve, caplog):
    live = serve(FakeEngine([1, 200002]))
    with closing(connect(live)) as client:
        head = HEAD + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head + b"not a length\r\n")
        assert refusal(rest(client))[0] == 400
    assert caplog.text == ""
