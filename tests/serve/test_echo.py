"""Log probabilities of prompts, as the official client and lm-evaluation-harness read them."""

import pytest

from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL
from tests.serve.test_openai_client import USER, events


@pytest.fixture
def plain(tokenizer):
    return FakeEngine([*tokenizer.encode(" one two three"), 200002])


def test_an_echo_with_logprobs_begins_with_those_of_the_prompt(serve, plain):
    client = serve(plain).openai()
    (choice,) = client.completions.create(model=MODEL, prompt="zero one", echo=True, logprobs=2, max_tokens=2).choices
    assert choice.text == "zero one one two"
    assert choice.logprobs.tokens == ["zero", " one", " one", " two"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 4, 8, 12]
    assert choice.logprobs.top_logprobs[0] is None
    assert [len(top) for top in choice.logprobs.top_logprobs[1:]] == [2, 2, 2]
    ((_, sampling),) = plain.submitted
    assert (sampling.logprobs, sampling.prompt_logprobs) == (2, 2)


def test_with_max_tokens_0_the_prompt_alone_comes_back(serve, plain):
    client = serve(plain).openai()
    answer = client.completions.create(model=MODEL, prompt=[2, 3, 4], echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("#$%", "length", 0)
    assert choice.logprobs.tokens == ["#", "$", "%"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25]
    assert choice.logprobs.text_offset == [0, 1, 2]
    silent = client.completions.create(model=MODEL, prompt="zero", max_tokens=0)
    assert (silent.choices[0].text, silent.choices[0].logprobs) == ("", None)


def test_a_stream_brings_a_prompts_logprobs_as_its_chunks_are_computed(serve, plain, tokenizer):
    plain.score_step = 2
    live = serve(plain)
    prompt = [*tokenizer.encode("zero one two three four "), *tokenizer.encode("\U0001f980"), 200007, 2]
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2, "return_tokens_as_token_ids": True}
    whole = live.complete(**body).json()["choices"][0]
    assert whole["logprobs"]["tokens"] == [f"token_id:{token}" for token in [*prompt, *tokenizer.encode(" one two")]]
    chunks = [event["choices"][0] for event in events(live.complete(**body, stream=True))]
    assert len(chunks) > 4
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, entries in whole["logprobs"].items():
        assert [entry for chunk in chunks for entry in chunk["logprobs"][name]] == entries
    hash_at = whole["text"].index("#")
    assert whole["logprobs"]["text_offset"][-4:] == [hash_at, hash_at, hash_at + 1, hash_at + 5]


def test_batches_come_in_the_order_of_their_prompts(serve, plain):
    """As lm-evaluation-harness asks, and reads the answer: the continuation is behind the context."""
    live = serve(plain)
    prompts = [[2, 3, 4, 5], [6, 7], [8, 9, 10]]
    body = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    choices = live.http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for choice, prompt in zip(choices, prompts, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][1:-1]
        assert logprobs == [-0.25] * (len(prompt) - 1)
        top = choice["logprobs"]["top_logprobs"][1:-1]
        assert [max(entry.values()) for entry in top] == logprobs


def test_prompt_logprobs_have_the_token_and_the_likeliest_by_id(serve, plain):
    plain.score_step = 1
    live = serve(plain)
    (choice,) = live.complete(prompt=[2, 3, 4], prompt_logprobs=2, max_tokens=1).json()["choices"]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            "3": {"logprob": -0.25, "rank": 1, "decoded_token": "$"},
            "4": {"logprob": -1.25, "rank": 2, "decoded_token": "%"},
        },
        {
            "4": {"logprob": -0.25, "rank": 1, "decoded_token": "%"},
            "5": {"logprob": -1.25, "rank": 2, "decoded_token": "&"},
        },
    ]
    both = live.complete(prompt=[2, 3], prompt_logprobs=3, echo=True, logprobs=1).json()["choices"][0]
    assert len(both["prompt_logprobs"][1]) == 3
    assert len(both["logprobs"]["top_logprobs"][1]) == 1
    alone = live.complete(prompt=[2, 3, 4], prompt_logprobs=0, max_tokens=0).json()["choices"][0]
    assert [list(entry) for entry in alone["prompt_logprobs"][1:]] == [["3"], ["4"]]


def test_chat_has_the_prompt_logprobs_once_whatever_the_choices(serve, plain):
    plain.score_step = 50
    live = serve(plain)
    answer = live.openai().chat.completions.create(model=MODEL, messages=USER, n=2, extra_body={"prompt_logprobs": 1})
    ids = plain.submitted[0][0]
    assert len(answer.choices) == 2
    assert answer.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in answer.prompt_logprobs[1:]] == [str(token) for token in ids[1:]]
    assert "prompt_logprobs" not in live.chat().json()


def test_the_first_prompt_token_is_all_of_a_prompt_of_one(serve, plain):
    body = {"prompt": [2], "echo": True, "logprobs": 0, "max_tokens": 1, "prompt_logprobs": 0}
    (choice,) = serve(plain).complete(**body).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert choice["prompt_logprobs"] == [None]


def test_tokenizer_info_says_that_no_control_token_has_a_spelling(serve, plain):
    """lm-evaluation-harness looks for eos_token, and would encode it by /tokenize."""
    info = serve(plain).http.get("/tokenizer_info").json()
    assert info["eos_token"] is None
    assert info["model_max_length"] == 1024
