"""The HTTP client against a real server over the faked engine."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from conf.limits import END_OF_TURN
from sweep import gate
from sweep.client import http_sender
from sweep.load import SendError, closed
from sweep.workload import Request
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL

TOKENS = list(range(1000, 1400))


def fetch(url, *requests, model=MODEL):
    async def all_of():
        async with http_sender(url, model, 0.5) as send:
            return [[tokens async for tokens in send(request)] for request in requests]

    return asyncio.run(all_of())


@asynccontextmanager
async def sending_to(handler):
    """A sender to a server that does nothing but `handler`."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with http_sender(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", MODEL, 1.0) as send:
        try:
            yield send
        finally:
            await runner.cleanup()


def test_tokens_are_counted_as_they_arrive_and_the_request_is_what_was_asked(serve):
    live = serve(FakeEngine(TOKENS))
    live.engine.step = 3
    (counts,) = fetch(f"http://127.0.0.1:{live.port}", Request([5, 6, 7], 10, 42))
    assert sum(counts) == 10
    assert max(counts) >= 3
    ((prompt, sampling),) = live.engine.submitted
    assert prompt == [5, 6, 7]
    assert (sampling.max_tokens, sampling.seed, sampling.temperature) == (10, 42, 0.5)
    assert not {*END_OF_TURN} & set(sampling.stop_token_ids)


def test_refusals_errors_and_broken_streams_are_told(serve):
    live = serve(FakeEngine(TOKENS))
    url = f"http://127.0.0.1:{live.port}"
    with pytest.raises(SendError, match="HTTP 404"):
        fetch(url, Request([1], 4, 0), model="another")
    live.engine.break_after = 2
    with pytest.raises(SendError, match="out of pages"):
        fetch(url, Request([1], 4, 0))
    with pytest.raises(SendError, match="ClientConnector"):
        fetch("http://127.0.0.1:1", Request([1], 4, 0))


def test_a_stream_that_ends_early_is_an_error():
    async def scenario():
        async def broken(request):
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b'data: {"choices": [{"token_ids": [1]}]}\n\n')
            return response

        async with sending_to(broken) as send:
            return (await closed(send, [Request([1], 2, 0)], 1, 60, 60, lambda record: None)).records

    (record,) = asyncio.run(scenario())
    assert record.tokens == [1]
    assert record.error == "the stream ended early"


def test_events_may_be_cut_anywhere():
    events = b"".join(b'data: {"choices": [{"token_ids": [%d, 2]}]}\n\n' % n for n in range(3)) + b"data: [DONE]\n\n"

    async def scenario():
        async def dripping(request):
            response = web.StreamResponse()
            await response.prepare(request)
            for at in range(0, len(events), 7):
                await response.write(events[at : at + 7])
                await asyncio.sleep(0)
            return response

        async with sending_to(dripping) as send:
            return [tokens async for tokens in send(Request([1], 6, 0))]

    assert asyncio.run(scenario()) == [2, 2, 2]


def test_arrivals_lie_between_the_servers_sending_and_the_end(serve):
    live = serve(FakeEngine(TOKENS))

    async def scenario():
        async with http_sender(f"http://127.0.0.1:{live.port}", MODEL, 1.0) as send:
            return await closed(send, [Request([1], 20, n) for n in range(8)], 4, 60, 60, lambda record: None)

    run = asyncio.run(scenario())
    assert [sum(record.tokens) for record in run.records] == [20] * 8
    assert all(record.arrivals == sorted(record.arrivals) for record in run.records)
    assert all(run.begin <= record.intended <= record.sent <= record.arrivals[0] for record in run.records)


def test_the_gate_reads_tokens_and_log_probabilities(serve):
    live = serve(FakeEngine(TOKENS))
    answers = gate.answers(f"http://127.0.0.1:{live.port}", MODEL, [[1, 2], [3]], 4, 60)
    assert answers == [gate.Greedy(TOKENS[:4], [-0.5] * 4)] * 2
    assert {sampling.temperature for _, sampling in live.engine.submitted} == {0}
    assert not {*END_OF_TURN} & {id for _, sampling in live.engine.submitted for id in sampling.stop_token_ids}
    live.engine.break_after = 2
    with pytest.raises(gate.GateFailed, match="out of pages"):
        gate.answers(f"http://127.0.0.1:{live.port}", MODEL, [[1, 2]], 4, 60)


def test_the_gates_prompts_leave_room_for_an_answer_and_are_always_the_same():
    assert gate.prompts(1000, 64) == gate.prompts(1000, 64)
    assert [len(prompt) for prompt in gate.prompts(1000, 1024)] == list(gate.PROMPT_LENGTHS)
    assert max(len(prompt) for prompt in gate.prompts(1000, 64)) == 32
    assert max(token for prompt in gate.prompts(10, 1024) for token in prompt) == 9


def test_the_gate_lets_ties_pass_and_nothing_else():
    baseline = [gate.Greedy([1, 2, 3], [-0.1, -0.7, -0.2])]

    def difference(tokens, logprobs):
        return gate.difference(baseline, [gate.Greedy(tokens, logprobs)], 0.125)

    assert difference([1, 2, 3], [-0.1, -0.7, -0.2]) is None
    assert difference([1, 9, 8], [-0.1, -0.75, -5.0]) is None
    assert difference([1, 9, 8], [-0.1, -0.2, -0.2]) == (
        "prompt 0, token 1: 9, the baseline has 2 (log probabilities 0.500 apart)"
    )
    assert difference([1, 9, 3], [-0.1, -1.5, -0.2]) == (
        "prompt 0, token 1: 9, the baseline has 2 (log probabilities 0.800 apart)"
    )
    assert difference([1, 2], [-0.1, -0.7]) == "prompt 0: 2 tokens, 3 in the baseline"
