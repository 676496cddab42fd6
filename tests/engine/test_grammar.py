"""Grammars and constraints: what random logits write by them is what they say, to the last token."""

import json
import random

import jsonschema
import pytest

from conf.limits import END, FIRST_SPECIAL, RETURN
from engine.grammar import Constraint, GrammarError
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.grammar import choice_form, json_form, regex_form, text_grammar, user_form
from tests.grammars import HOSTILE, Walker, random_schema


@pytest.fixture(scope="session")
def walker():
    return Walker()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer()


def text_of(tokenizer, tokens):
    assert tokens[-1] >= FIRST_SPECIAL
    assert max(tokens[:-1], default=0) < FIRST_SPECIAL, "a control token within"
    return b"".join(map(tokenizer.token_bytes, tokens[:-1])).decode()


def check(walker, tokenizer, schema, seed, most):
    text = text_of(tokenizer, walker.answer(text_grammar(json_form(schema, "")).text, seed, most))
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_get_valid_answers(walker, tokenizer, name):
    for seed in range(3):
        check(walker, tokenizer, HOSTILE[name], seed, 60)


@pytest.mark.parametrize("most", [5, 120])  # cut after so few tokens, an answer is the beginning of a valid one
def test_random_schemas_get_valid_answers(walker, tokenizer, most):
    for seed in range(40):
        check(walker, tokenizer, random_schema(random.Random(1000 * most + seed)), seed, most)


def test_choices_regular_expressions_and_grammars_are_met(walker, tokenizer):
    choices = ["a/b", "a/b c", "(x)|y", "\n#ü", "<|end|>"]
    for seed in range(10):
        assert text_of(tokenizer, walker.answer(text_grammar(choice_form(choices, "")).text, seed)) in choices
        regex = text_grammar(regex_form(r"\d{1,3}/[a-c]\/(é|ü)+#", "")).text
        number, letter, rest = text_of(tokenizer, walker.answer(regex, seed, 20)).split("/")
        assert number.isdecimal()
        assert letter in "abc"
        assert set(rest) <= set("éü#")
        for grammar in ('start: "yes" | "no" NUMBER\nNUMBER: /[0-9]+/', 'root ::= "yes" | "no" [0-9]+'):
            text = text_of(tokenizer, walker.answer(text_grammar(user_form(grammar, "")).text, seed, 20))
            assert text == "yes" or text.removeprefix("no").isdecimal()


def test_a_text_of_a_control_token_is_no_control_token(walker, tokenizer):
    tokens = walker.answer(text_grammar(choice_form(["<|end|>"], "")).text, 0)
    assert END not in tokens
    assert text_of(tokenizer, tokens) == "<|end|>"


def test_until_min_tokens_an_answer_does_not_end_where_it_can_go_on(walker):
    grammar = text_grammar(regex_form("(ab)*", "")).text
    for seed in range(5):
        answer = walker.answer(grammar, seed, 8, min_tokens=6, stop_token_ids=(RETURN, 199999))
        assert len(answer) > 6
    only = walker.answer(text_grammar(choice_form(["ab"], "")).text, 0, min_tokens=6, stop_token_ids=(RETURN, 199999))
    assert len(only) <= 3  # it cannot go on


@pytest.mark.parametrize("grammar", ["", "start: (", '{"grammars": [{"json_schema": {"type": "text"}}]}', "{"])
def test_what_is_no_grammar_is_an_error(walker, grammar):
    with pytest.raises(GrammarError):
        walker.compiler.compile(grammar)


def test_a_token_against_the_grammar_is_an_error(walker, tokenizer):
    start = walker.compiler.compile(text_grammar(choice_form(["ab"], "")).text)
    constraint = Constraint(start, SamplingParams(max_tokens=9, seed=0))
    other = Constraint(start, SamplingParams(max_tokens=9, seed=0))
    (token,) = tokenizer.encode("x")
    constraint.accept(token)
    assert constraint.error
    assert not other.error
