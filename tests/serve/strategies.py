"""What a model may write and a client may send: answers, and hypothesis strategies over them. Knows no endpoint."""

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NEXT = "<|end|><|start|>assistant"
THINKS = f"<|channel|>analysis<|message|>Look it up.{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>One moment.{NEXT}"
CALLS = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"place": "Oslo"}<|call|>'
ANSWER = THINKS + "<|channel|>final<|message|>It is cold, say they.<|return|>"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2000) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def pieces(*others: str) -> st.SearchStrategy[list[str | int]]:
    """Texts and tokens that an answer is put together from: the format's marks and words, whole messages, `others`."""
    return st.lists(
        st.sampled_from(
            [
                *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>"),
                *("assistant", "user", "commentary", "analysis", "final", "text", " ", "\U0001f9d1", "\ufeff"),
                *(" to=functions.get_weather", " to=functions.none"),
                *("json", "{}", "[" * 9, '"\\ud800"'),
                *(200002, 200018, 201000),  # an end, and tokens that nobody has named
                THINKS,
                PREAMBLE,
                CALLS.replace("<|call|>", NEXT),
                *others,
            ]
        ),
        max_size=25,
    )


@st.composite
def changed(draw: st.DrawFn, body: dict[str, Any], values: Sequence[object]) -> dict[str, Any]:
    """A copy of `body` in which a few values, at any depth, are any JSON or one of `values`, or are gone."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 4)):
                place[key] = copy.deepcopy(draw(JSON | st.sampled_from(values)))
            else:
                del place[key]
            break
    return body
