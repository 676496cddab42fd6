"""Log probabilities of a prompt's tokens: the same bytes however the prompt is cut, packed, cached or preempted."""

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


def prompts(count, longest=300):
    draw = random.Random(0)
    return [[draw.randrange(TINY.vocab) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def engine_of(folder, **options):
    return InProcess(folder, dtype=torch.bfloat16, **{"prompt_logprobs": (64, 256), **options})


@pytest.fixture(scope="module")
def alone(folder):
    """Log probabilities and greedy tokens of each prompt with an engine to itself."""
    engine = engine_of(folder, prefix_cache=False)
    answers = []
    for prompt in prompts(6):
        id = engine.submit(prompt, max_tokens=3, prompt_logprobs=4)
        engine.run()
        answers.append((engine.prompt_logprobs(id), engine.tokens(id)))
    return answers


def test_they_are_those_of_the_logits_that_follow_each_token(folder, alone):
    engine = InProcess(folder, dtype=torch.bfloat16, poison=False)
    for prompt, (found, _) in zip(prompts(6), alone, strict=True):
        with torch.inference_mode():
            logits = engine.all_logits(prompt, chunk=256)[:-1]
        assert len(found) == len(logits)
        for row, token, entry in zip(logits, prompt[1:], found, strict=True):
            order = row.sort(descending=True, stable=True).indices.tolist()
            assert entry.rank == order.index(token) + 1
            assert entry.top_ids == order[:4]
            expected = row.log_softmax(-1)[[token, *order[:4]]]
            torch.testing.assert_close(torch.tensor([entry.logprob, *entry.top_logprobs]), expected)
            if entry.rank == 1:
                assert entry.logprob == entry.top_logprobs[0]


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"prefix_cache": False},
        {"prompt_logprobs": (64,), "sequences": 1},
        {"prompt_logprobs": (200,), "prefill_tokens": (256,)},
    ],
    ids=str,
)
def test_they_are_the_same_bytes_alone_and_among_others(folder, alone, setting):
    engine, ids = engine_of(folder, **setting), []
    for number, prompt in enumerate(prompts(6)):
        ids.append(engine.submit(prompt, max_tokens=3, prompt_logprobs=4))
        engine.submit(prompt, max_tokens=5)  # one that wants none, and leaves its pages in the cache
        if number % 2:
            engine.core.turn()
    engine.run()
    assert [(engine.prompt_logprobs(id), engine.tokens(id)) for id in ids] == alone
    assert engine.pool.used == 0


def test_a_cached_prompt_is_computed_again_for_them(folder, alone):
    engine = engine_of(folder)
    prompt = max(prompts(6), key=len)
    engine.generate(prompt, max_tokens=1)
    id = engine.submit(prompt, max_tokens=3, prompt_logprobs=4)
    engine.run()
    assert engine.deltas[id][0].cached_tokens == 0
    assert engine.prompt_logprobs(id) == max(alone, key=lambda answer: len(answer[0]))[0]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_they_are_the_same_bytes_after_preemption(folder, prefix_cache):
    short = [prompt[:60] for prompt in prompts(4)]
    results = []
    for pages in (100, 7):
        engine = engine_of(folder, pages=pages, prefix_cache=prefix_cache)
        ids = [engine.submit(prompt, max_tokens=80, prompt_logprobs=2) for prompt in short]
        engine.run()
        results.append([(engine.prompt_logprobs(id), engine.tokens(id)) for id in ids])
    assert engine.scheduler.preemptions > 0
    assert results[0] == results[1]


def test_a_request_that_wants_them_changes_no_other_step(folder):
    """The packed inputs of all other buckets are those of a server that cannot score."""
    without, with_them = (engine_of(folder, prompt_logprobs=sizes) for sizes in ((), (64, 256)))
    buckets = without.buckets.all
    assert with_them.buckets.all[: len(buckets)] == buckets
    for bucket in buckets:
        assert with_them.buffers.words_of(bucket) == without.buffers.words_of(bucket)
    answers = []
    for engine in (without, with_them):
        engine.generate(prompts(1)[0], logprobs=2)
        answers.append([(delta.tokens, delta.logprobs) for delta in engine.deltas[0]])
    assert answers[0] == answers[1]
    assert {bucket.kind for bucket in with_them.core.stats().buckets if bucket.steps} == {"decode", "prefill"}


def test_without_a_bucket_for_them_they_are_refused(folder):
    engine = InProcess(folder)
    id = engine.submit([1, 2, 3], prompt_logprobs=0)
    (delta,) = engine.deltas[id]
    assert delta.finish_reason == "error"
    assert "buckets.prompt_logprobs" in delta.error
