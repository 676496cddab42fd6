"""Encoding, incremental decoding and stop strings say the same whatever the pieces."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Delta
from engine.tokenizer import RUN, SLICE, Tokenizer, slices
from serve.endpoints.completions import TextChoice
from serve.message import ChatChoice
from serve.protocol import ChatRequest, CompletionRequest
from serve.text import StopMatcher, StopStrings
from tests.serve.conftest import parse

TOKENIZER = Tokenizer()
# Few letters, so that stop strings occur and overlap; characters of one to four bytes.
LETTERS = st.text(alphabet="ab\u00e9\u4e2d\U0001f600", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\u00e9\u4e2d", min_size=1, max_size=5), max_size=4)
# Any bytes at all: tokens of single bytes, of parts of characters, ordinary ones and control tokens.
IDS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 199_997), st.integers(199_998, 201_087)), max_size=30)


def cut(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(c % (len(tokens) + 1) for c in cuts), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(edges)]


def ends_first(text: str, stops: list[str]) -> str:
    """The definition: cut at the stop string completed first, the longest of those completed there."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))]
    return text


def read(tokens: list[int], cuts: list[int], stops: list[str], finish: str = "length") -> list[str]:
    """The streamed texts of a completion whose tokens arrive in these pieces."""
    request = CompletionRequest(prompt="x", stop=stops)
    choice = TextChoice(0, request, [1], "", StopStrings(stops), TOKENIZER)
    pieces, texts = cut(tokens, cuts), []
    for i, piece in enumerate(pieces):
        part = choice.feed(Delta(0, piece, finish if i == len(pieces) - 1 else None))
        texts.append(part.text)
        if part.finish_reason:
            break
    return texts


@given(tokens=IDS, cuts=st.lists(st.integers(0, 30), max_size=6), stops=STOPS)
def test_streamed_pieces_add_up_to_the_text_decoded_at_once(tokens, cuts, stops):
    whole = ends_first(TOKENIZER.decode(tokens, skip_special=True), stops)
    assert "".join(read(tokens, cuts, stops)) == whole


@given(text=LETTERS, cuts=st.lists(st.integers(0, 60), max_size=8), stops=STOPS)
def test_stop_strings_are_found_across_tokens_and_never_shown(text, cuts, stops):
    shown = "".join(read(TOKENIZER.encode(text), cuts, stops))
    assert shown == ends_first(text, stops)
    assert not any(stop in shown for stop in stops)


@given(text=LETTERS, cuts=st.lists(st.integers(0, 40), max_size=8), stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text, cuts, stops):
    matcher, shown, seen = StopMatcher(StopStrings(stops)), "", ""
    for piece in cut(text, cuts):
        shown += matcher.feed(piece)
        seen += piece
        if matcher.stopped:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


CHATTY = st.lists(
    st.one_of(
        st.sampled_from([200005, 200006, 200007, 200008, 35644, 17196, 173781, 12606, 815]),
        st.integers(0, 300),
        st.integers(0, 201_087),
    ),
    max_size=40,
)


@given(tokens=CHATTY.filter(bool), cuts=st.lists(st.integers(0, 40), max_size=8), stops=STOPS, stopped=st.booleans())
def test_a_chat_says_the_same_however_its_tokens_arrive(tokens, cuts, stops, stopped):
    def reading(pieces: list[list[int]]) -> tuple:
        choice = ChatChoice(0, ChatRequest(messages=[]), (), StopStrings(stops), TOKENIZER, [])
        parts, last = [], "stop" if stopped else "length"
        for piece in pieces:
            parts.append(choice.feed(Delta(0, piece, last if piece is pieces[-1] else None)))
            if parts[-1].finish_reason:
                break
        words = ["".join(getattr(part.delta, name) or "" for part in parts) for name in ("content", "reasoning")]
        return *words, parts[-1].finish_reason, choice.completion_tokens, choice.reasoning_tokens

    at_once = reading([tokens])
    assert reading([piece for piece in cut(tokens, cuts) if piece]) == at_once
    messages = parse(tokens[:-1] if stopped else tokens, TOKENIZER)
    content = "".join(text for segment, text in messages if segment.kind == "content")
    assert at_once[0] == ends_first(content, stops)


def test_no_piece_of_a_split_character_is_ever_sent():
    tokens = TOKENIZER.encode("\U0001f9d1\u200d\U0001f680 caf\u00e9")
    pieces = read(tokens, list(range(len(tokens))), [])
    assert "".join(pieces) == "\U0001f9d1\u200d\U0001f680 caf\u00e9"
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_stop_token_is_not_in_the_text_even_where_control_tokens_are():
    request = CompletionRequest(prompt="x", skip_special_tokens=False)
    choice = TextChoice(0, request, [1], "", StopStrings([]), TOKENIZER)
    part = choice.feed(Delta(0, [*TOKENIZER.encode("one"), 200007, *TOKENIZER.encode("two"), 200002], "stop"))
    assert part.text == "one<|end|>two"


def test_stop_strings_do_not_count_before_min_tokens():
    tokens = TOKENIZER.encode("one two three one two three")
    request = CompletionRequest(prompt="x", stop=" two", min_tokens=3)
    choice = TextChoice(0, request, [1], "", StopStrings([" two"]), TOKENIZER)
    assert choice.feed(Delta(0, tokens, "length")).text == "one two three one"
    assert choice.completion_tokens == 5


def test_an_id_without_a_token_decodes_to_the_replacement_character():
    assert TOKENIZER.decode([2**40, -1], skip_special=False) == "\ufffd\ufffd"


def test_control_tokens_in_text_encode_as_text():
    assert TOKENIZER.encode("<|end|>") == [27, 91, 419, 91, 29]


WORDS = st.lists(
    st.sampled_from(
        [
            "word",
            "Word",
            "don't",
            "x1",
            "1234",
            " ",
            "  ",
            "\n",
            "\r\n",
            ", ",
            ".",
            "\u3002",
            "\u4e2d\u6587",
            "e\u0301",
            "\u0e01\u0e33",
            "/",
            "\u00b2",
            "_",
            "!\n",
            "\t",
            "'s",
            "'",
        ]
    ),
    min_size=1,
    max_size=12,
).map("".join)


@settings(max_examples=40)
@given(text=WORDS)
def test_slicing_changes_no_token_of_text_that_has_breaks(text):
    long = text + " and so on, again. " + text
    times = 2 * SLICE // len(long) + 2
    assert TOKENIZER.encode(long * times) == TOKENIZER.encoding.encode(long * times, disallowed_special=())


@pytest.mark.parametrize("unit", ["a", "\u00e9", "\u4e2d", "\U0001f600", "!", " ", "\n", "/\n", "=-", "\u0301", "aA"])
def test_no_slice_holds_a_long_run_and_nothing_is_lost(unit):
    """Encoding takes time quadratic in a run: 200,000 letters without a break would take seconds."""
    text = unit * 100_000
    parts = list(slices("start " + text + " end"))
    assert "".join(parts) == "start " + text + " end"
    assert max(map(len, parts)) <= 2 * RUN


def test_encoding_stops_soon_after_the_limit():
    assert 1000 < len(TOKENIZER.encode("word " * 1_000_000, limit=1000)) < 20_000


def test_surrogates_are_replaced_not_raised():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b"), skip_special=True) == "a\ufffdb"
