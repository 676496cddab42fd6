"""The first cases of `make fuzz`, and that it notices what it looks for."""

import logging

import pytest

from engine.messages import Delta
from serve import parsing
from serve.endpoints.messages import MessagesChoice
from serve.message import ChatChoice, ChatDelta, LogprobReader
from serve.stream import EventFormat
from tests.serve import fuzz

CASES = 300


def test_any_stream_of_tokens_is_answered_and_streamed_as_it_is_answered_whole():
    assert fuzz.run("stream", CASES) == CASES


def test_any_body_is_answered_or_refused():
    assert 0 < fuzz.run("body", CASES) < CASES


def crash(*_: object) -> None:
    raise RuntimeError("on purpose")


def lose_a_character(choice: ChatChoice, delta: Delta) -> ChatDelta:
    fed = FEED(choice, delta)
    if fed.delta.content and len(delta.tokens) == 1:
        fed.delta.content = fed.delta.content[1:]
    return fed


FEED, PARSE = ChatChoice.feed, parsing.parse


@pytest.mark.parametrize(
    ("kind", "where", "name", "fault", "says"),
    [
        ("stream", ChatChoice, "feed", lose_a_character, "streamed"),
        ("stream", MessagesChoice, "_close", lambda _: None, None),
        ("stream", EventFormat, "last", lambda *_: b"", "not complete"),
        ("stream", LogprobReader, "entries", crash, "500"),
        ("body", parsing, "normalise", crash, "500"),
    ],
)
def test_a_fault_is_noticed_and_its_case_named(monkeypatch, kind, where, name, fault, says):
    monkeypatch.setattr(where, name, fault)
    with pytest.raises(Exception, match=says) as error:
        fuzz.run(kind, CASES)
    assert f"--kind {kind} --seed 0 --first" in error.value.__notes__[0]


def test_a_line_in_the_log_is_a_failure(monkeypatch):
    def logging_parse(*arguments: object) -> object:
        logging.getLogger("serve.guard").error("on purpose")
        return PARSE(*arguments)

    monkeypatch.setattr("serve.endpoints.chat.parse", logging_parse)
    with pytest.raises(AssertionError, match="on purpose"):
        fuzz.run("stream", CASES)
