"""The demo model's evaluation over HTTP: a real server that renders and parses, an engine that knows every answer."""

from dataclasses import replace

import pytest

from demo.training.data import document, evaluation, tokenizer
from demo.training.evaluate import ServerError, report, served
from demo.training.skills import SKILLS
from serve.harmony import RETURN
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL, TODAY


def knowing(examples):
    """Continues the prompt of each example as wanted, whatever of the answer stands in the prompt already."""
    documents = [document(e if e.skill == "today" else replace(e, today=TODAY)) for e in examples]
    whole = [prompt + completion for prompt, completion in documents]

    def script(prompt, sampling):
        return next(tokens for tokens in whole if tokens[: len(prompt)] == prompt)[len(prompt) :]

    return FakeEngine(script)


def test_a_server_that_answers_as_wanted_is_right_in_everything(serve):
    examples = [e for skill in SKILLS for e in evaluation(skill, 24)]
    demanded = [e for e in examples if e.call and not e.analysis]
    assert {len(e.functions) > 1 for e in demanded} == {False, True}  # with one function, more of the call is given
    assert any(turn.calls for e in examples for turn in e.turns)
    live = serve(knowing(examples))
    result = report(served(f"http://127.0.0.1:{live.port}", MODEL, 4), 24)
    assert result.wrong == []
    assert result.share == 1
    assert f"| all | {len(examples)} | 100.0 % | 100.0 % |" in result.table
    assert len(live.engine.submitted) == len(examples)


@pytest.mark.parametrize(
    ("tokens", "valid"),
    [
        ([*tokenizer().encode("No."), RETURN], True),
        (tokenizer().encode("and so on ") * 200, False),  # never ends
        ([RETURN], False),
    ],
)
def test_other_answers_are_wrong_and_valid_only_if_they_say_something_and_end(serve, tokens, valid):
    live = serve(FakeEngine(tokens))
    (e,) = evaluation("letters", 1)
    (answer,) = served(f"http://127.0.0.1:{live.port}", MODEL, 1)([e])
    assert answer.valid is valid
    result = report(served(f"http://127.0.0.1:{live.port}", MODEL, 4), 1)
    assert result.share == 0
    assert len(result.wrong) == len(SKILLS)


def test_a_server_that_refuses_or_is_not_there_is_named(serve):
    live = serve(FakeEngine([RETURN]))
    url = f"http://127.0.0.1:{live.port}"
    with pytest.raises(ServerError, match=f"{url}/v1/chat/completions: status 404: the model 'other' is not served"):
        report(served(url, "other", 2), 1)
    with pytest.raises(ServerError, match=r"http://127.0.0.1:9/v1/.*refused.*is a server running there"):
        report(served("http://127.0.0.1:9", MODEL, 2), 1)
