"""Answers over a raw socket: their framing for HTTP/1.0, which knows no chunks, and for HTTP/1.1."""

import json
import socket

import pytest

from tests.fakes import FakeEngine

MESSAGES = [{"role": "user", "content": "x"}]
BODIES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/v1/responses": {"input": "x"},
}


def ask(live, request_line: str, body: bytes = b"", headers: str = "") -> tuple[str, dict[str, str], bytes]:
    """The status line, the headers and all bytes up to the end of the connection."""
    head = f"{request_line}\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, rest = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status, dict(line.lower().split(": ", 1) for line in lines), rest


@pytest.mark.parametrize("headers", ["", "Connection: keep-alive\r\n"])
@pytest.mark.parametrize("path", BODIES)
def test_a_stream_to_http_1_0_is_unchunked_and_ends_with_the_connection(serve, path, headers):
    live = serve(FakeEngine([1, 2, 3, 200002]))
    body = {**BODIES[path], "stream": True}
    status, given, rest = ask(live, f"POST {path} HTTP/1.0", json.dumps(body).encode(), headers)
    assert status.endswith("200 OK")
    assert given["connection"] == "close"
    assert not given.keys() & {"transfer-encoding", "content-length"}
    lines = rest.decode().split("\n")
    assert {line.partition(":")[0] for line in lines} <= {"data", "event", ""}
    assert rest.endswith(b"\n\n")
    assert any(end in lines[-3] for end in ("[DONE]", "message_stop", "response.completed"))


def test_a_long_stream_to_http_1_0_arrives_whole(serve, tokenizer):
    engine = FakeEngine(tokenizer.encode(" word") * 4000, max_context=8192)
    engine.step = 7
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True, "logprobs": 20}).encode()
    _, _, rest = ask(serve(engine), "POST /v1/completions HTTP/1.0", body)
    events = [json.loads(event.removeprefix(b"data: ")) for event in rest.split(b"\n\n")[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == " word" * 4000


@pytest.mark.parametrize(
    ("line", "body"),
    [
        ("GET /health HTTP/1.0", b""),
        ("POST /v1/completions HTTP/1.0", b'{"prompt": "x"}'),
        ("POST /v1/completions HTTP/1.0", b"{"),
        ("GET /nowhere HTTP/1.0", b""),
    ],
)
def test_a_whole_answer_to_http_1_0_has_its_length_and_ends_the_connection(serve, line, body):
    _, given, rest = ask(serve(FakeEngine([1, 200002])), line, body)
    assert given["connection"] == "close"
    assert "transfer-encoding" not in given
    assert int(given["content-length"]) == len(rest) > 0


def test_head_over_http_1_0_has_no_body(serve):
    _, given, rest = ask(serve(FakeEngine([])), "HEAD /health HTTP/1.0")
    assert (given["connection"], rest) == ("close", b"")
    assert int(given["content-length"]) > 0


def test_a_client_of_http_1_0_that_goes_away_aborts_its_request(serve):
    engine = FakeEngine([1] * 1000)
    engine.delay = 0.01
    live = serve(engine)
    body = b'{"prompt": "x", "max_tokens": 1000, "stream": true}'
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        connection.recv(1000)
    live.eventually(lambda: engine.aborted == [0])


def test_a_stream_to_http_1_1_is_chunked(serve):
    body = b'{"prompt": "x", "stream": true}'
    live = serve(FakeEngine([1, 200002]))
    _, given, rest = ask(live, "POST /v1/completions HTTP/1.1", body, "Connection: close\r\n")
    assert given["transfer-encoding"] == "chunked"
    assert rest.endswith(b"0\r\n\r\n")
