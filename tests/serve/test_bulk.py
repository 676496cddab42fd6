"""Bodies of many small values are refused while they arrive, whatever the pieces; long texts are not."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import bulk
from serve.bulk import Bulk
from serve.protocol import ApiError
from tests.fakes import FakeEngine

PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize", "/detokenize"]
JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('ab"\\[{,}]:é\n')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('ab"\\[{,')), inner),
    max_leaves=20,
)


def counts(value) -> tuple[int, int, int]:
    """Strings, lists and objects, and commas of a value."""
    if isinstance(value, str):
        return 1, 0, 0
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = [counts(item) for item in (value if isinstance(value, list) else [*value, *value.values()])]
    strings, containers, commas = (sum(column) for column in zip(*inner, strict=True)) if inner else (0, 0, 0)
    return strings, containers + 1, commas + max(0, len(value) - 1)


@given(JSON, st.integers(1, 9), st.booleans())
def test_what_is_counted_is_what_is_there_wherever_the_body_is_cut(value, size, escaped):
    body, counter = json.dumps(value, ensure_ascii=escaped).encode(), Bulk()
    for i in range(0, len(body), size):
        counter.feed(body[i : i + size])
    assert (counter._quotes / 2, counter._containers, counter._commas) == counts(value)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"[" + b"[]," * 20_000, "lists and objects"),
        (b"[" * 20_000, "lists and objects"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(60_000)), "strings"),
        (b"[" + b"1," * 400_000, "values"),
    ],
    ids=["empty lists", "nested", "keys", "numbers"],
)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize", "/detokenize"]
)
def test_a_body_of_many_values_is_refused_before_it_is_decoded(serve, monkeypatch, body, what, path):
    live = serve(FakeEngine([1]))
    monkeypatch.setattr(msgspec.json, "decode", None)
    answer = live.http.post(path, content=body)
    assert (answer.status_code, what in answer.json()["error"]["message"]) == (400, True)


def test_a_text_of_brackets_and_a_prompt_of_many_token_ids_are_taken(serve):
    live = serve(FakeEngine([1, 200002], max_context=200_000))
    assert live.complete(prompt='[{",\\' * 8000).status_code == 200
    assert live.complete(prompt=[1] * 131_072).status_code == 200
    messages = [{"role": "user", "content": "x"}] * (bulk.MAX_STRINGS // 4 - 10)
    assert live.chat(messages=messages).status_code == 200


def test_the_limits_are_counted_in_each_body_alone():
    for _ in range(3):
        Bulk().feed(b"[]," * (bulk.MAX_CONTAINERS - 1))
    with pytest.raises(ApiError):
        Bulk().feed(b"[]," * (bulk.MAX_CONTAINERS + 1))
