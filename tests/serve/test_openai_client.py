"""What the official client gets: both endpoints, streaming and not."""

import json

import pytest

from serve.harmony import Turn, render
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL, TODAY

REPLY = (
    "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello, you!<|return|>"
)
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def plain(tokenizer):
    return FakeEngine([*tokenizer.encode(" one two three four"), 200002])


@pytest.fixture
def chatty(harmony):
    return FakeEngine(harmony(REPLY))


def events(response) -> list[dict]:
    """The JSON events of a stream, [DONE] checked and taken off."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_completion(serve, plain):
    answer = serve(plain).openai().completions.create(model=MODEL, prompt="zero")
    assert answer.choices[0].text == " one two three four"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (1, 5, 6)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_a_streamed_completion_says_the_same(serve, plain):
    plain.step = 2
    stream = (
        serve(plain)
        .openai()
        .completions.create(model=MODEL, prompt="zero", stream=True, stream_options={"include_usage": True})
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == " one two three four"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert last.choices == []
    assert last.usage.completion_tokens == 5


def test_usage_is_streamed_only_on_request_and_null_until_the_last_event(serve, plain, chatty):
    assert all("usage" not in event for event in events(serve(plain).complete(stream=True)))
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    for response in (serve(plain).complete(**options), serve(chatty).chat(**options)):
        *earlier, last = events(response)
        assert [event["usage"] for event in earlier] == [None] * len(earlier)
        assert last["usage"]["completion_tokens"] > 0


def test_a_chat(serve, chatty):
    answer = serve(chatty).openai().chat.completions.create(model=MODEL, messages=USER)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", "Hello, you!")
    assert message.reasoning_content == message.reasoning == "They greet."
    assert message.model_dump(exclude_unset=True)["refusal"] is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_a_streamed_chat_says_the_same_however_its_tokens_arrive(serve, chatty, step):
    chatty.step = step
    stream = (
        serve(chatty)
        .openai()
        .chat.completions.create(model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True})
    )
    first, *chunks, last = stream
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Hello, you!"
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "They greet."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert last.usage.completion_tokens_details.reasoning_tokens == 3


def test_reasoning_is_left_out_on_request(serve, chatty):
    live = serve(chatty)
    message = live.chat(include_reasoning=False).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("Hello, you!", None, None)
    streamed = events(live.chat(include_reasoning=False, stream=True))
    assert not any("reasoning" in event["choices"][0]["delta"] for event in streamed)


def test_a_turn_without_an_answer_has_null_content_its_reasoning_and_the_engines_reason(serve, chatty):
    choice = serve(chatty).chat(max_tokens=5).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == "They greet"
    assert choice["finish_reason"] == "length"


def test_reasoning_that_is_held_back_until_the_end_is_counted(serve, harmony):
    live = serve(FakeEngine(harmony("<|channel|>analysis code")))  # it might be a content type
    answer = live.chat().json()
    assert answer["choices"][0]["message"]["reasoning"] == " code"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 1
    shown = {"messages": USER, "max_tokens": 9, "thinking": {"type": "adaptive"}}
    message = live.http.post("/v1/messages", json=shown).json()
    assert message["content"][0]["thinking"] == " code"
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] == 1


def test_the_prompt_of_a_chat_is_the_rendered_conversation(serve, chatty, tokenizer):
    live = serve(chatty)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo <|end|>"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning_content": "old"},
        {"role": "user", "content": parts},
    ]
    assert live.chat(messages=messages, reasoning_effort="low").status_code == 200
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "1"),
        Turn("assistant", "one", "old"),
        Turn("user", "Hello <|end|>"),
    ]
    assert live.engine.submitted[0][0] == render(turns, "low", TODAY, tokenizer, 10**6)


def test_both_names_of_reasoning_are_accepted(serve, chatty):
    live = serve(chatty)
    for name in ("reasoning", "reasoning_content"):
        live.chat(messages=[*USER, {"role": "assistant", "content": None, name: "thought"}])
    assert live.engine.submitted[0][0] == live.engine.submitted[1][0]


# --- sampling parameters ---


def test_defaults_reach_the_engine(serve, plain):
    live = serve(plain)
    live.complete()
    live.chat()
    (_, completion), (prompt, chat) = live.engine.submitted
    assert (completion.max_tokens, chat.max_tokens) == (16, 1024 - len(prompt))
    for sampling in (completion, chat):
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
        assert sampling.stop_token_ids == (200002, 199999, 200012)
        assert sampling.logprobs is None
    assert completion.seed != chat.seed


def test_given_parameters_reach_the_engine(serve, plain):
    live = serve(plain)
    given = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "max_tokens": 7,
    }
    assert (
        live.complete(
            **given, logit_bias={"5": -100}, stop_token_ids=[9], ignore_eos=True, seed=11, logprobs=3
        ).status_code
        == 200
    )
    sampling = live.engine.submitted[0][1]
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.logit_bias, sampling.stop_token_ids, sampling.seed) == ({5: -100.0}, (9,), 11)
    assert sampling.logprobs == 3


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_of_minus_one_or_zero_is_off(serve, plain, top_k):
    live = serve(plain)
    live.complete(top_k=top_k)
    assert live.engine.submitted[0][1].top_k == 0


@pytest.mark.parametrize(("seed", "drawn"), [(-1, 2**63 - 1), (-(2**63), 0), (2**63 - 1, 2**63 - 1)])
def test_every_64_bit_seed_becomes_one_of_63_bits(serve, plain, seed, drawn):
    live = serve(plain)
    live.complete(seed=seed)
    assert live.engine.submitted[0][1].seed == drawn


def test_null_means_not_given(serve, plain):
    live = serve(plain)
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "seed",
        "n",
        "logprobs",
        "logit_bias",
        "stream",
        "stream_options",
        "suffix",
        "best_of",
        "response_format",
        "user",
    )
    assert live.complete(**dict.fromkeys(names)).status_code == 200
    assert live.engine.submitted[0][1].max_tokens == 16


def test_max_completion_tokens_is_max_tokens(serve, plain):
    live = serve(plain)
    live.chat(max_completion_tokens=3)
    assert live.engine.submitted[0][1].max_tokens == 3


def test_the_default_length_shrinks_to_what_fits(serve, plain):
    live = serve(plain)
    live.complete(prompt=[1] * 1020)
    assert live.engine.submitted[0][1].max_tokens == 4


def test_end_tokens_outside_a_small_vocabulary_are_dropped(serve):
    live = serve(FakeEngine([65, 66], vocab_size=1000))
    assert live.complete(prompt=[1, 2]).status_code == 200
    assert live.engine.submitted[0][1].stop_token_ids == ()


# --- several answers ---


def test_several_choices_draw_with_consecutive_seeds_and_keep_their_indices(serve, tokenizer):
    def script(prompt, sampling):
        return tokenizer.encode(f" {prompt[0]}:{sampling.seed}")

    live = serve(FakeEngine(script))
    answer = live.complete(prompt=[[1], [2, 2]], n=2, seed=2**63 - 1).json()
    expected = [f" {p}:{s}" for p in (1, 2) for s in (2**63 - 1, 0)]
    assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(expected))
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    texts = [""] * 4
    for event in events(live.complete(prompt=[[1], [2, 2]], n=2, seed=2**63 - 1, stream=True)):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == expected


def test_tokens_that_show_nothing_send_no_event(serve, chatty):
    _, *streamed = [event["choices"][0] for event in events(serve(chatty).chat(stream=True))]
    assert all(choice["delta"] or choice["finish_reason"] for choice in streamed)


def test_several_chat_choices_are_streamed_side_by_side(serve, chatty):
    streamed = events(serve(chatty).chat(n=3, stream=True))
    assert [e["choices"][0]["delta"].get("role") for e in streamed[:3]] == ["assistant"] * 3
    contents = [""] * 3
    for event in streamed:
        contents[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    assert contents == ["Hello, you!"] * 3


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [378], [[378]]])
def test_a_prompt_comes_in_four_forms(serve, plain, prompt):
    live = serve(plain)
    assert live.complete(prompt=prompt).status_code == 200
    assert live.engine.submitted[0][0] == [378]


# --- stop strings ---


def test_a_stop_string_ends_the_answer_aborts_the_rest_and_is_not_shown(serve, tokenizer):
    live = serve(FakeEngine(tokenizer.encode(" one two three four five")))
    answer = live.complete(stop=["o thr", "five"]).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (" one tw", "stop")
    assert answer["usage"]["completion_tokens"] == 3
    assert live.engine.aborted == [0]


def test_stop_strings_do_not_match_inside_reasoning(serve, harmony):
    output = "<|channel|>analysis<|message|>stop here<|end|><|start|>assistant<|channel|>final<|message|>go, stop, go"
    choice = serve(FakeEngine(harmony(output))).chat(stop="stop").json()["choices"][0]
    assert choice["message"]["reasoning"] == "stop here"
    assert choice["message"]["content"] == "go, "
    assert choice["finish_reason"] == "stop"


def test_one_choice_that_stops_leaves_the_others_running(serve, tokenizer):
    def script(prompt, sampling):
        return tokenizer.encode(" a b c d") if sampling.seed == 0 else tokenizer.encode(" e f g h")

    choices = serve(FakeEngine(script)).complete(n=2, seed=0, stop=" c").json()["choices"]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [(" a b", "stop"), (" e f g h", "length")]


def test_a_choice_that_stops_is_aborted_at_once_not_when_the_others_end(serve, tokenizer):
    def script(prompt, sampling):
        return tokenizer.encode(" a b c" if sampling.seed == 0 else " e") * 300

    live = serve(FakeEngine(script, max_context=4096))
    live.engine.delay = 0.005
    body = {"prompt": "x", "n": 2, "seed": 0, "stop": " c", "stream": True, "max_tokens": 4000}
    with live.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: the connection is closed with it
        next(line for line in lines if '"finish_reason":"stop"' in line)
        live.eventually(lambda: live.engine.aborted == [0])
        assert live.engine.running == {1}


def test_a_stop_token_of_the_clients_own_is_not_in_the_answer(serve, chatty, harmony):
    (you,) = harmony(" you")
    live = serve(chatty)
    assert live.chat(stop_token_ids=[you]).json()["choices"][0]["message"]["content"] == "Hello,"
    assert live.complete(stop_token_ids=[you]).json()["choices"][0]["text"].endswith("Hello,")


def test_in_a_chat_too_stop_strings_do_not_count_before_min_tokens(serve, harmony):
    live = serve(FakeEngine(harmony("<|channel|>final<|message|>go go go go")))
    assert live.chat(stop=" go", min_tokens=5).json()["choices"][0]["message"]["content"] == "go go"


# --- what else a reply may contain ---


def test_completion_logprobs_name_tokens_and_their_place_in_the_text(serve, tokenizer):
    crab = tokenizer.encode("\U0001f980")
    live = serve(FakeEngine([*tokenizer.encode("hi you"), *crab]))
    logprobs = live.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["hi", " you"]
    assert logprobs["tokens"][2].startswith("bytes:\\x")
    assert logprobs["text_offset"] == [0, 2, *[6] * len(crab)]
    assert logprobs["token_logprobs"] == [-0.5] * (2 + len(crab))
    assert len(logprobs["top_logprobs"][0]) == 2
    streamed = [e["choices"][0]["logprobs"] for e in events(live.complete(logprobs=2, stream=True))]
    assert [t for lists in streamed for t in lists["tokens"]] == logprobs["tokens"]
    assert [t for lists in streamed for t in lists["text_offset"]] == logprobs["text_offset"]


def test_chat_logprobs_concern_the_answer_only(serve, chatty):
    live = serve(chatty)
    content = live.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["Hello", ",", " you", "!"]
    assert content[0]["bytes"] == list(b"Hello")
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 4
    streamed = [e["choices"][0]["logprobs"] for e in events(live.chat(logprobs=True, top_logprobs=2, stream=True))]
    assert [entry for lists in streamed if lists for entry in lists["content"]] == content
    assert live.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_echo_begins_with_the_prompt(serve, plain):
    live = serve(plain)
    assert live.complete(prompt="zero", echo=True).json()["choices"][0]["text"] == "zero one two three four"
    assert "".join(e["choices"][0]["text"] for e in events(live.complete(prompt="zero", echo=True, stream=True))) == (
        "zero one two three four"
    )


def test_an_echo_shows_control_tokens_on_request(serve, plain):
    live = serve(plain)
    for skip, shown in ((True, "#"), (False, "#<|end|>")):
        body = {"prompt": [2, 200007], "echo": True, "skip_special_tokens": skip, "max_tokens": 1}
        assert live.complete(**body).json()["choices"][0]["text"] == shown + " one"


def test_control_tokens_are_shown_on_request(serve, tokenizer):
    live = serve(FakeEngine([200007, *tokenizer.encode(" one two three four"), 200002]))
    assert live.complete().json()["choices"][0]["text"] == " one two three four"
    assert live.complete(skip_special_tokens=False).json()["choices"][0]["text"] == "<|end|> one two three four"


def test_token_ids_stand_where_vllm_puts_them(serve, chatty, harmony):
    live, ids = serve(chatty), harmony(REPLY)
    completion = live.complete(prompt=[7, 8], return_token_ids=True, max_tokens=20).json()
    assert completion["choices"][0]["prompt_token_ids"] == [7, 8]
    assert completion["choices"][0]["token_ids"] == ids
    streamed = [
        e["choices"][0] for e in events(live.complete(prompt=[7, 8], return_token_ids=True, max_tokens=20, stream=True))
    ]
    assert [c.get("prompt_token_ids") for c in streamed] == [[7, 8], *[None] * (len(streamed) - 1)]
    assert [t for c in streamed for t in c["token_ids"]] == ids
    chat = live.chat(return_token_ids=True).json()
    prompt = live.engine.submitted[-1][0]
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == (prompt, ids)
    streamed = events(live.chat(return_token_ids=True, stream=True))
    assert [e.get("prompt_token_ids") for e in streamed] == [prompt, *[None] * (len(streamed) - 1)]
    assert [t for e in streamed for t in e["choices"][0].get("token_ids", [])] == ids


@pytest.mark.parametrize("step", [1, 4, 100])
def test_token_ids_end_with_the_token_that_completes_a_stop_string(serve, harmony, step):
    header, text = harmony("<|channel|>final<|message|>"), harmony(" one two three four five")
    engine = FakeEngine([*header, *text])
    engine.step = step
    live = serve(engine)
    body = {"stop": "three", "return_token_ids": True}
    for response in (live.complete(**body, max_tokens=20), live.chat(**body)):
        assert response.json()["choices"][0]["token_ids"] == [*header, *text[:3]]
    for response in (live.complete(**body, max_tokens=20, stream=True), live.chat(**body, stream=True)):
        streamed = [token for e in events(response) for token in e["choices"][0].get("token_ids", [])]
        assert streamed == [*header, *text[:3]]


def test_the_model_list(serve, plain):
    (model,) = serve(plain).openai().models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 1024)


def test_before_the_engine_is_ready_the_model_has_no_length(serve, plain):
    plain.ready = None
    (model,) = serve(plain).http.get("/v1/models").json()["data"]
    assert (model["id"], "max_model_len" in model) == (MODEL, False)


def test_tokenize_and_detokenize(serve, plain, tokenizer):
    live = serve(plain)
    answer = live.http.post("/tokenize", json={"prompt": "Hello <|end|>", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("Hello <|end|>")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 1024)
    assert answer["token_strs"][0] == "Hello"
    assert live.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hello <|end|>"}
    chat = live.http.post("/tokenize", json={"messages": USER}).json()
    assert chat["tokens"] == render([Turn("user", "Hello")], "medium", TODAY, tokenizer, 10**6)
