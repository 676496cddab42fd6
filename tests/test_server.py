"""`python serve.py` as a user runs it: a real process, real sockets, real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from http.client import HTTPConnection

import httpx
import psutil
import pytest
from openai import OpenAI

from demo.checkpoint import write_checkpoint
from tests.harness import TINY
from tests.served import GREEDY, ROOT, START_SECONDS, Served, free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, TINY, seed=7)
    return path


def served(folder, *arguments):
    return Served(
        "model.weights=checkpoint",
        f"model.path={folder}",
        "kernels.dtype=float32",
        "kernels.device=cpu",
        "buckets.max_context=512",
        *arguments,
    )


def test_the_demo_model_answers_the_official_client():
    with Served().wait_ready() as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["demo"]
        asked = {
            "model": "demo",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 128,
        }
        (whole,) = client.chat.completions.create(**asked).choices
        assert whole.finish_reason == "stop"
        assert whole.message.content == "The capital of France is Paris."
        parts = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.message.content


def test_an_unused_connection_stays_open(folder):
    with (
        served(folder).wait_ready() as server,
        closing(HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection,
    ):
        for unused in (6, 0):  # uvicorn's own choice is 5 seconds, clients keep a connection for longer
            connection.request("GET", "/v1/models")
            assert json.loads(connection.getresponse().read())["data"]
            time.sleep(unused)


def test_ranks_hold_one_model_and_a_killed_one_ends_the_server(folder):
    prompts = [[5, 6, 7], list(range(200)), [9] * 70]
    answers = {}
    for tp in (1, 2, 4):
        with served(folder, f"tp={tp}").wait_ready() as server:
            answers[tp] = [server.complete(prompt=prompt).json()["choices"][0]["token_ids"] for prompt in prompts]
            ranks = server.ranks()
            assert len(ranks) == tp
            if tp == 1:
                continue
            ranks[-1].kill()
            output, _ = server.process.communicate(timeout=20)
            assert server.process.returncode == 1
            assert f"CRITICAL rank {tp - 1} ended with signal SIGKILL: the server stops" in output
            assert "Traceback" not in output  # the other ranks notice too, and would bury the cause
            assert not any(rank.is_running() for rank in ranks)
    assert answers[1] == answers[2] == answers[4]


def stream(server, lines, **body):
    body = GREEDY | {"max_tokens": 200, "stream": True} | body
    with (
        suppress(httpx.HTTPError),  # a server that stops at once breaks the connection
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response,
    ):
        for line in response.iter_lines():
            lines += [line.removeprefix("data: ")] if line else []


def running(server, lines, **body):
    """A thread that reads a stream, once the engine runs it."""
    thread = threading.Thread(target=stream, args=(server, lines), kwargs={"ignore_eos": True, **body})
    thread.start()
    while 'num_requests_running{model_name="demo"} 1' not in httpx.get(f"{server.url}/metrics").text:
        time.sleep(0.01)
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_lets_streams_finish_refuses_new_requests_and_exits_with_0(folder, number):
    with served(folder).wait_ready() as server:
        lines = []
        thread = running(server, lines)
        server.process.send_signal(number)
        while httpx.get(f"{server.url}/health/ready").status_code == 200:
            time.sleep(0.01)
        refused = server.complete()
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert httpx.get(f"{server.url}/health").status_code == 200
        thread.join()
        assert server.process.wait(timeout=20) == 0
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"


def test_a_second_signal_stops_at_once_and_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(folder).wait_ready() as server:
        assert list(tmp_path.glob("mini-vllm-*"))
        ranks, lines = server.ranks(), []
        thread = running(server, lines, max_tokens=500)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        output, _ = server.process.communicate(timeout=10)
        thread.join()
    assert server.process.returncode == 1
    assert "SIGTERM again: stopping at once, 1 requests unfinished" in output
    assert "Traceback" not in output
    assert "[DONE]" not in lines
    assert not any(rank.is_running() for rank in ranks)
    assert not list(tmp_path.glob("mini-vllm-*"))


def test_an_engine_lost_while_draining_is_an_error_and_its_reason_is_told(folder):
    with served(folder).wait_ready() as server:
        lines = []
        thread = running(server, lines, max_tokens=500)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.ranks()[0].kill()
        output, _ = server.process.communicate(timeout=20)
        thread.join()
    assert server.process.returncode == 1
    assert "CRITICAL rank 0 ended with signal SIGKILL: the server stops" in output
    assert "the engine failed: rank 0 ended with signal SIGKILL" in lines[-1]


def test_a_drain_that_takes_too_long_is_no_failure_of_the_engine(folder):
    with served(folder, "server.drain_seconds=0.3").wait_ready() as server:
        lines = []
        thread = running(server, lines, max_tokens=500)
        server.process.send_signal(signal.SIGTERM)
        output, _ = server.process.communicate(timeout=20)
        thread.join()
    assert server.process.returncode == 0
    assert "1 requests unfinished after server.drain_seconds = 0.3" in output
    error = json.loads(lines[-1])["error"]
    assert (error["code"], error["message"]) == ("draining", "the server was stopped before the answer was complete")


def test_a_hangup_reads_the_key_file_again(folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("\ufeffold\n", "utf-8")
    with served(folder, f"server.api_key_file={keys}").wait_ready() as server:

        def status(key):
            return httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key}).status_code

        assert (status("old"), status("new")) == (200, 401)
        keys.write_text("# nobody\n")
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert status("old") == 200
        keys.write_text("# of today\nnew\n")
        server.process.send_signal(signal.SIGHUP)
        while status("new") == 401:
            time.sleep(0.01)
        assert (status("old"), status("# of today")) == (401, 401)


def test_pages_that_hold_less_than_the_context_are_the_context():
    with Served("kernels.device=cpu", "buckets.max_context=512", "buckets.pages=3").wait_ready() as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 128
        message = {"messages": [{"role": "user", "content": "x"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=message, timeout=60)
        assert answer.status_code == 200
        assert server.complete(prompt=[1] * 64, max_tokens=64, ignore_eos=True).json()["usage"]["total_tokens"] == 128
        refused = server.complete(prompt=[1] * 64, max_tokens=65)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        server.process.send_signal(signal.SIGTERM)
        output, _ = server.process.communicate(timeout=20)
    assert "buckets.max_context: got 512, the pages hold 128" in output


def test_of_two_servers_that_start_at_once_on_one_port_one_starts(folder):
    with served(folder) as first, served(folder, f"server.port={first.port}") as second:
        servers = [first, second]
        while all(server.process.poll() is None for server in servers):
            time.sleep(0.05)
        (lost,) = [server for server in servers if server.process.poll() is not None]
        (line,) = lost.process.stdout.read().splitlines()
        assert f"cannot listen on 127.0.0.1:{first.port}" in line
        servers.remove(lost)
        servers[0].url = first.url
        servers[0].wait_ready()


@pytest.mark.parametrize("moment", ["starting", "ready"])
def test_ranks_do_not_outlive_a_killed_server(folder, moment):
    with served(folder, "tp=2") as server:
        if moment == "ready":
            server.wait_ready()
        while len(ranks := server.ranks()) < 2:
            time.sleep(0.001)
        os.kill(server.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive


@pytest.mark.parametrize("tp", [1, 2])
def test_a_hung_rank_is_noticed_within_the_deadline(folder, tp):
    with served(folder, "server.step_deadline=1", f"tp={tp}").wait_ready() as server:
        ranks = server.ranks()
        ranks[-1].suspend()
        answer = server.complete()
        assert answer.status_code == 503
        assert "no step finished within 1 s" in answer.json()["error"]["message"]
        assert server.process.wait(timeout=20) == 1
        assert not any(rank.is_running() for rank in ranks)


def test_a_checkpoint_that_cannot_be_read_ends_the_start_with_its_reason(tmp_path):
    with served(tmp_path) as server:
        output, _ = server.process.communicate(timeout=START_SECONDS)
    assert server.process.returncode == 1
    assert str(tmp_path) in output
    assert "Traceback" not in output


def test_a_port_in_use_is_noticed_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "serve.py", f"server.port={port}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert f"127.0.0.1:{port}" in line


def test_a_temporary_folder_too_deep_for_sockets_is_said_in_one_line(tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    result = subprocess.run(
        [sys.executable, "serve.py", f"server.port={free_port()}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"TMPDIR": str(deep)},
    )
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"configuration: TMPDIR: got {deep}")
    assert not any(deep.iterdir())


def test_too_few_open_files_are_said_in_one_line():
    result = subprocess.run(
        ["bash", "-c", f"ulimit -n 200; exec {sys.executable} serve.py server.port={free_port()}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("configuration: server.max_connections: got 2048, allowed: at most 104 ")
