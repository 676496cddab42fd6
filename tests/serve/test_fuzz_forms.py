"""The first cases of `make fuzz-forms`, and that it notices what it looks for."""

import pytest

from serve.grammar import object_form
from tests.grammars import Walker
from tests.serve import fuzz_forms
from tests.serve.test_fuzz import lose_a_character

CASES = 30


@pytest.fixture(scope="module")
def walker():
    return Walker()


def test_answers_are_what_was_demanded_at_every_endpoint(walker):
    counts = fuzz_forms.run(CASES, walker)
    assert set(counts) >= {"/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"}
    assert counts["whole"]
    assert counts["cut"]
    assert counts["harmony"]


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("serve.endpoints.completions.requested_form", lambda _: object_form("")),
        ("serve.message.ChatChoice.feed", lose_a_character),
    ],
)
def test_a_fault_is_noticed_and_its_case_named(walker, monkeypatch, where, fault):
    monkeypatch.setattr(where, fault)
    with pytest.raises(Exception, match="--seed 0 --first"):
        fuzz_forms.run(CASES, walker)
