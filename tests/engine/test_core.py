"""The engine's promises: a request's tokens are its own, whatever else runs and however its pages came about."""

import random

import pytest
import torch

from demo.checkpoint import write_checkpoint
from tests.harness import TINY, InProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, TINY, seed=7)
    return path


def prompts(count, longest=300, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(TINY.vocab) for _ in range(draw.randint(1, longest))] for _ in range(count)]


SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 100,
    "seed": 11,
    "presence_penalty": 0.3,
    "repetition_penalty": 1.1,
}


def options(number):
    return SAMPLED if number % 2 else {}


@pytest.fixture(scope="module")
def alone(folder):
    """Tokens of each prompt with an engine to itself."""
    engine = InProcess(folder, dtype=torch.bfloat16, prefix_cache=False)
    return [engine.generate(prompt, max_tokens=10, **options(n))[0] for n, prompt in enumerate(prompts(8))]


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"prefix_cache": False},
        {"decode_rows": (8,), "prefill_tokens": (256,)},
        {"prefill_tokens": (64,), "sequences": 1},
    ],
    ids=str,
)
def test_tokens_are_the_same_bytes_alone_and_among_others(folder, alone, setting):
    engine, ids = InProcess(folder, dtype=torch.bfloat16, **setting), []
    for number, prompt in enumerate(prompts(8)):
        ids.append(engine.submit(prompt, max_tokens=10, **options(number)))
        if number % 3 == 0:
            engine.core.turn()
    engine.run()
    assert [engine.tokens(id) for id in ids] == alone
    assert engine.pool.used == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_tokens_are_the_same_bytes_after_preemption(folder, prefix_cache):
    short = [prompt[:60] for prompt in prompts(4)]
    setting = {"dtype": torch.bfloat16, "prefix_cache": prefix_cache}
    roomy, tight = InProcess(folder, pages=100, **setting), InProcess(folder, pages=7, **setting)
    results = []
    for engine in (roomy, tight):
        ids = [engine.submit(prompt, max_tokens=80, **options(number)) for number, prompt in enumerate(short)]
        engine.run()
        results.append([engine.tokens(id) for id in ids])
    assert roomy.scheduler.preemptions == 0
    assert tight.scheduler.preemptions > 0
    assert results[0] == results[1]


def test_a_shared_prefix_is_found_and_changes_nothing(folder):
    shared = prompts(1, seed=3)[0] + [5] * 200
    engine, plain = InProcess(folder), InProcess(folder, prefix_cache=False)
    for tail in ([1], [2, 3], [1]):
        assert engine.generate(shared + tail) == plain.generate(shared + tail)
    assert engine.scheduler.prefix_hit_tokens >= 2 * 192
    assert engine.deltas[2][0].cached_tokens >= 192


def test_an_aborted_request_leaves_the_others_alone(folder):
    first, second, third = prompts(3, seed=5)
    expected = InProcess(folder).generate(second, max_tokens=30)[0]
    engine = InProcess(folder)
    doomed = engine.submit(first, max_tokens=100)
    kept = engine.submit(second, max_tokens=30)
    waiting = engine.submit(third, max_tokens=30)
    engine.abort(waiting)
    for _ in range(5):
        engine.core.turn()
    engine.abort(doomed)
    seen = len(engine.tokens(doomed))
    engine.run()
    assert engine.tokens(kept) == expected
    assert len(engine.tokens(doomed)) == seen
    assert engine.tokens(waiting) == []
    assert engine.pool.used == 0


def test_the_end_of_a_request_says_why(folder):
    engine = InProcess(folder)
    prompt = prompts(1)[0]
    tokens = engine.generate(prompt, max_tokens=12)[0]
    assert engine.deltas[0][-1].finish_reason == "length"
    assert len(tokens) == 12
    stop = tokens[5]
    cut = engine.generate(prompt, max_tokens=12, stop_token_ids=(stop,))[0]
    assert cut == tokens[: tokens.index(stop) + 1]
    assert engine.deltas[1][-1].finish_reason == "stop"


def test_min_tokens_keeps_stop_tokens_from_being_drawn(folder):
    engine = InProcess(folder)
    prompt = prompts(1)[0]
    first = engine.generate(prompt, max_tokens=1)[0][0]
    tokens = engine.generate(prompt, max_tokens=12, min_tokens=8, stop_token_ids=(first,))[0]
    assert first not in tokens[:8]
    assert len(tokens) >= 8


def test_a_request_that_can_never_run_is_answered_at_once(folder):
    engine = InProcess(folder, max_context=128)
    id = engine.submit([1] * 100, max_tokens=29)
    (delta,) = engine.deltas[id]
    assert delta.finish_reason == "error"
    assert "100" in delta.error
    assert "29" in delta.error
    assert "128" in delta.error


def test_logprobs_are_those_of_the_tokens_that_were_drawn(folder):
    engine = InProcess(folder)
    prompt = prompts(1, longest=50)[0]
    tokens = engine.generate(prompt, max_tokens=6, logprobs=5)[0]
    found = [entry for delta in engine.deltas[0] for entry in delta.logprobs]
    with torch.inference_mode():
        expected = engine.all_logits(prompt + tokens, chunk=256)[len(prompt) - 1 : -1].log_softmax(-1)
    for row, token, entry in zip(expected, tokens, found, strict=True):
        best = row.topk(5)
        assert entry.top_ids == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), best.values, atol=1e-4, rtol=0)
        assert abs(entry.logprob - float(row[token])) < 1e-4


def penalized(logits, prompt, answer, sampling):
    """One token's logits [V] with the penalties, counted here."""
    seen = torch.tensor(sorted({*prompt, *answer}))
    logits = logits.clone()
    repeated = logits[seen]
    factor = sampling["repetition_penalty"]
    logits[seen] = torch.where(repeated > 0, repeated / factor, repeated * factor)
    for token in set(answer):
        logits[token] -= sampling["frequency_penalty"] * answer.count(token) + sampling["presence_penalty"]
    return logits


def test_penalties_count_prompt_and_answer_and_survive_preemption(folder):
    """Every greedy token is the likeliest after the penalties that its own prompt and answer so far bring."""
    sampling = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3}
    engine, oracle = InProcess(folder, pages=7), InProcess(folder)
    all_prompts = prompts(4, longest=100, seed=9)
    ids = [engine.submit(prompt, max_tokens=60, **sampling) for prompt in all_prompts]
    engine.run()
    assert engine.scheduler.preemptions > 0
    for id, prompt in zip(ids, all_prompts, strict=True):
        answer = engine.tokens(id)
        with torch.inference_mode():
            logits = oracle.all_logits(prompt + answer, chunk=256)[len(prompt) - 1 : -1]
        for count, (row, token) in enumerate(zip(logits, answer, strict=True)):
            expected = penalized(row, prompt, answer[:count], sampling)
            assert expected[token] > expected.max() - 1e-4, (id, count)


def test_logit_bias_forces_and_forbids(folder):
    engine = InProcess(folder)
    prompt = prompts(1)[0]
    assert engine.generate(prompt, max_tokens=4, logit_bias={17: 100.0})[0] == [17] * 4
    first = engine.generate(prompt, max_tokens=1)[0][0]
    assert engine.generate(prompt, max_tokens=1, logit_bias={first: -100.0})[0] != [first]


def test_bucket_statistics_add_up(folder):
    engine = InProcess(folder)
    engine.generate(*prompts(3), max_tokens=9)
    stats = engine.core.stats()
    assert stats.running == stats.waiting == stats.pages_used == 0
    for bucket in stats.buckets:
        assert bucket.rows_used + bucket.rows_padded == bucket.steps * bucket.size
    computed = sum(b.rows_used for b in stats.buckets if b.kind == "prefill")
    assert computed == sum(map(len, prompts(3)))
