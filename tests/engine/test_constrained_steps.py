"""Requests with a grammar through the whole engine, on random weights: what they draw, and what others see of them."""

import json
import time
from dataclasses import replace

import jsonschema
import pytest

from conf.limits import ENDOFTEXT, RETURN, VOCABULARY
from engine.llm import LLM
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.grammar import choice_form, json_form, regex_form, text_grammar
from tests.harness import TINY, InProcess, prompt_of

SHAPE = replace(TINY, layers=2, hidden=32, intermediate=32, heads=2, kv_heads=2, vocab=VOCABULARY, windows=(128, None))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 4}, "b": {"enum": ["x", "yé"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORM = text_grammar(json_form(SCHEMA, "")).text
STOPS = (RETURN, ENDOFTEXT)
HELD = {"grammar": FORM, "stop_token_ids": STOPS, "max_tokens": 60}


def engine_of(**options) -> InProcess:
    return InProcess(SHAPE, decode_rows=(1, 4), prefill_tokens=(128,), max_context=256, **options)


@pytest.fixture(scope="module")
def engine():
    return engine_of(pages=40)


def check(tokens: list[int]) -> None:
    assert tokens[-1] in STOPS
    tokenizer = Tokenizer()
    jsonschema.validate(json.loads(b"".join(map(tokenizer.token_bytes, tokens[:-1]))), SCHEMA)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 2.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": -1.0},
        {"logit_bias": {123: 100.0}, "temperature": 1.0},
        {"min_tokens": 30, "temperature": 1.0},
        {"logprobs": 3},
    ],
    ids=str,
)
def test_an_answer_is_valid_with_every_option(engine, options):
    (tokens,) = engine.generate(prompt_of(9, 1000), **HELD | options)
    check(tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_can_only_end_does_so_before_min_tokens(engine, temperature):
    only = text_grammar(choice_form(["ab"], "")).text
    (tokens,) = engine.generate([1, 2], **HELD | {"grammar": only, "min_tokens": 30, "temperature": temperature})
    assert tokens[-1] in STOPS
    assert Tokenizer().decode(tokens, skip_special=True) == "ab"


def test_others_in_the_batch_draw_what_they_draw_alone_and_so_do_those_with_a_grammar(engine):
    free = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    held = HELD | {"temperature": 1.0, "seed": 4, "max_tokens": 150}
    prompts = [prompt_of(length, 1000) for length in (5, 70, 7)]
    ids = [engine.submit(prompts[0], **free), engine.submit(prompts[1], **held), engine.submit(prompts[2], **held)]
    engine.run()
    batch = [engine.tokens(id) for id in ids]
    alone = [engine.generate(prompt, **given)[0] for prompt, given in zip(prompts, (free, held, held), strict=True)]
    assert batch == alone
    check(batch[1])
    check(batch[2])


def test_preempted_answers_go_on_where_they_were(engine):
    prompts = [prompt_of(length, 1000) for length in (62, 60, 63)]
    wanted = {"grammar": text_grammar(regex_form("[a-z ]{20,40}", "")).text, "stop_token_ids": STOPS, "max_tokens": 60}
    wanted |= {"temperature": 1.0, "seed": 2, "min_tokens": 8}
    narrow = engine_of(pages=4, prefix_cache=False)
    assert narrow.generate(*prompts, **wanted) == engine.generate(*prompts, **wanted)
    assert narrow.scheduler.preemptions


def test_an_aborted_request_leaves_nothing_whether_compiled_or_not(engine):
    id = engine.submit([1, 2, 3], **HELD)
    engine.abort(id)
    engine.run()
    assert engine.deltas[id] == []
    id = engine.submit([1, 2, 3], **HELD)
    while not engine.deltas[id]:
        assert engine.core.turn()
    engine.abort(id)
    engine.run()
    assert engine.deltas[id][-1].finish_reason is None
    assert engine.core.stats().waiting == engine.core.stats().running == 0


def test_what_cannot_be_compiled_ends_with_an_error_and_others_go_on(engine):
    bad, good = engine.submit([1], grammar="start: ("), engine.submit([1], max_tokens=3)
    engine.run()
    (delta,) = engine.deltas[bad]
    assert (delta.tokens, delta.finish_reason) == ([], "error")
    assert delta.error
    assert len(engine.tokens(good)) == 3


def test_a_model_of_fewer_tokens_refuses_a_grammar():
    engine = InProcess(TINY, decode_rows=(1,), prefill_tokens=(64,), max_context=128, pages=4)
    id = engine.submit([1], **HELD)
    assert engine.deltas[id][0].finish_reason == "error"
    assert "vocabulary" in engine.deltas[id][0].error


def test_the_loop_steps_while_a_grammar_is_compiled(engine):
    class Slow:
        def compile(self, grammar):
            time.sleep(0.3)
            return compiler.compile(grammar)

    grammars = engine.core._grammars
    compiler, grammars._compiler = grammars._compiler, Slow()
    try:
        held, free = engine.submit([1, 2], **HELD), engine.submit([1], max_tokens=2)
        while len(engine.tokens(free)) < 2:
            assert engine.core.turn()
        assert engine.deltas[held] == []
        engine.run()
    finally:
        grammars._compiler = compiler
    check(engine.tokens(held))


def test_two_ranks_draw_what_one_does_with_masks_that_cross_to_the_other():
    small = ["kernels.device=cpu", "buckets.max_context=256", "buckets.decode_rows=[2]", "buckets.prefill_tokens=[64]"]
    sampling = SamplingParams(seed=0, temperature=0.0, **HELD)
    answers = []
    for ranks in (1, 2):
        with LLM([*small, f"tp={ranks}"]) as llm:
            answers.append(
                [completion.tokens for completion in llm.generate(["The capital of France: "] * 2, sampling)]
            )
    assert answers[0] == answers[1]
    for tokens in answers[1]:
        check(tokens)
