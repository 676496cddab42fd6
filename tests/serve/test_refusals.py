"""What is refused, with which status and which field; and what is accepted because it changes nothing."""

import asyncio
import http.client
import json
import logging

import pytest

from conf.limits import BIAS_ENTRIES, END_OF_TURN, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS
from conf.schema import ServerConfig
from serve.app import create_app
from serve.guard import Guard, Keys
from serve.workers import Workers
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL

USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def live(serve):
    return serve(FakeEngine([1, 2, 200002]))


def error(response, status: int) -> dict:
    assert response.status_code == status, response.text
    fields = response.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert fields["message"]
    return fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("n", 0),
        ("n", 17),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.5),
        ("stop", ["a"] * 17),
        ("stop", "a" * 257),
        ("stop_token_ids", [1] * 18),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [201088]),
        ("logit_bias", {"201088": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("min_tokens", 17),
        ("min_tokens", -1),
        ("stream", "yes"),
        ("stream_options", 5),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("max_tokens", -2),
        ("logprobs", -1),
        ("model", 5),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_named(live, field, value):
    fields = error(live.complete(**{field: value}), 400)
    assert fields["type"] == "invalid_request_error"
    assert fields["param"].split("[")[0] == field
    assert live.engine.submitted == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "Hello"),
        ("messages", [{"role": "robot", "content": "x"}]),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": None}]),
        ("reasoning_effort", "extreme"),
        ("top_logprobs", 21),
        ("top_logprobs", 3),
        ("logprobs", 3),
        ("include_reasoning", "no"),
        ("stop", 5),
        ("n", 17),
    ],
)
def test_a_chat_value_that_is_wrong_is_named(live, field, value):
    assert field in error(live.chat(**{field: value}), 400)["param"]


def test_a_missing_field_is_named(live):
    assert error(live.http.post("/v1/completions", json={}), 400)["param"] == "prompt"
    assert error(live.http.post("/v1/chat/completions", json={}), 400)["param"] == "messages"


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["a", ""], ["a", 1], [1, [2]], [-1], [201088], [[1], [201088]], None, 5]
)
def test_a_prompt_that_cannot_be_run_is_refused(live, prompt):
    assert error(live.complete(prompt=prompt), 400)["param"].split("[")[0] == "prompt"


def test_text_outside_a_small_vocabulary_is_refused(serve):
    live = serve(FakeEngine([1], vocab_size=1000))
    assert "vocabulary of 1000" in error(live.complete(prompt="\u4e2d\u6587\u5b57"), 400)["message"]
    assert error(live.chat(), 400)["param"] == "messages"


def test_a_prompt_that_does_not_fit_is_refused_with_all_numbers(live):
    fields = error(live.complete(prompt=[1] * 1000, max_tokens=25), 400)
    assert fields["code"] == "context_length_exceeded"
    assert [number in fields["message"] for number in ("1000", "25", "1024")] == [True] * 3
    assert error(live.complete(prompt=[1] * 1024), 400)["param"] == "prompt"
    assert error(live.chat(messages=[{"role": "user", "content": "word " * 2000}]), 400)["param"] == "messages"
    assert live.complete(prompt=[1] * 999, max_tokens=25).status_code == 200


def test_a_request_at_every_limit_is_within_the_engines_own(live):
    stop_token_ids = list(range(100, 100 + MAX_STOP_TOKENS - len(END_OF_TURN)))
    logit_bias = {str(token): 1 for token in range(MAX_LOGIT_BIAS)}
    limits = {"stop_token_ids": stop_token_ids, "logit_bias": logit_bias, "logprobs": MAX_TOP_LOGPROBS}
    assert live.complete(**limits).status_code == 200
    sampling = live.engine.submitted[0][1]
    assert len(sampling.stop_token_ids) == MAX_STOP_TOKENS
    assert len(sampling.logit_bias) + len(sampling.stop_token_ids) == BIAS_ENTRIES
    error(live.complete(stop_token_ids=[*stop_token_ids, 1]), 400)


def test_two_names_of_the_longest_answer_must_agree(live):
    assert error(live.chat(max_tokens=3, max_completion_tokens=4), 400)["param"] == "max_completion_tokens"
    assert live.chat(max_tokens=3, max_completion_tokens=3).status_code == 200


def test_n_times_prompts_is_capped(live):
    assert error(live.complete(prompt=["a"] * 5, n=13), 400)["param"] == "n"
    assert live.complete(prompt=["a"] * 4, n=16).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"text"',
        b"{'prompt': 1}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/responses/input_tokens"),
        *("/tokenize", "/detokenize"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(live, path, body):
    assert error(live.http.post(path, content=body), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"),
        ("best_of", 2),
        ("modalities", ["audio"]),
        ("audio", {}),
        ("functions", [{}]),
        ("chat_template", "x"),
        ("use_beam_search", True),
        ("truncate_prompt_tokens", 5),
        ("prediction", {}),
        ("bad_words", ["a"]),
    ],
)
def test_what_this_server_cannot_do_is_refused_not_ignored(live, field, value):
    for response in (live.complete(**{field: value}), live.chat(**{field: value})):
        fields = error(response, 400)
        assert (fields["param"], fields["code"]) == (field, "unsupported_parameter")
    assert live.engine.submitted == []


def test_log_probabilities_of_prompts_are_refused_where_the_server_computes_none(serve):
    live = serve(FakeEngine([], scored=0))
    for response, param in (
        (live.complete(echo=True, logprobs=1), "logprobs"),
        (live.complete(prompt_logprobs=0), "prompt_logprobs"),
        (live.chat(prompt_logprobs=1), "prompt_logprobs"),
    ):
        fields = error(response, 400)
        assert (fields["param"], fields["code"]) == (param, "unsupported_parameter")
        assert "buckets.prompt_logprobs" in fields["message"]
    assert live.engine.submitted == []
    assert live.complete(echo=True).status_code == live.complete(logprobs=1).status_code == 200


def test_prompt_logprobs_are_not_streamed(live):
    for response in (live.complete(prompt_logprobs=1, stream=True), live.chat(prompt_logprobs=1, stream=True)):
        assert error(response, 400)["param"] == "prompt_logprobs"


def test_images_are_refused(live):
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    fields = error(live.chat(messages=[{"role": "user", "content": image}]), 400)
    assert fields["param"] == "messages[0].content"
    assert "image_url" in fields["message"]


def test_values_that_change_nothing_are_accepted(live):
    neutral = {
        "suffix": None,
        "best_of": 1,
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "functions": [],
        "length_penalty": 1.0,
        "modalities": ["text"],
    }
    for response in (live.complete(**neutral), live.chat(**neutral, tools=[], tool_choice="auto")):
        assert response.status_code == 200
        assert "x-ignored-parameters" not in response.headers


FUNCTION = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [FUNCTION] * 129}, "tools"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": FUNCTION}, "tool_choice"),
        ({"messages": [*USER, {"role": "tool", "tool_call_id": "1", "content": "x"}]}, "messages[1].tool_call_id"),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}]},
            "messages[2].tool_call_id",
        ),
        (
            {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages[1].tool_calls[0].function",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        (
            {
                "messages": [
                    *USER,
                    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": ""}},
                ]
            },
            "messages[1].function_call",
        ),
        ({"messages": [*USER, {"role": "function", "name": "f", "content": "x"}]}, "messages[1].role"),
    ],
)
def test_tools_that_do_not_fit_together_are_refused_by_name(live, given, param):
    assert error(live.chat(**given), 400)["param"] == param


def test_a_schema_too_deep_to_describe_is_refused(live):
    schema = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"x": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert error(live.chat(tools=[tool]), 400)["param"].startswith("tools[0].function.parameters.properties.x")


def test_unknown_fields_are_ignored_and_named(live):
    response = live.complete(**{"flavour": 1, "also\r\nevil: 1": 2}, stream=False)
    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"] == "also??evil??1, flavour"
    assert live.complete(flavour=1, stream=True).headers["x-ignored-parameters"] == "flavour"


def test_unknown_fields_inside_messages_and_options_are_named_too(live):
    messages = [
        {"role": "assistant", "content": "x", "refusal": None, "annotations": []},
        {"role": "user", "content": "x", "name": "me"},
    ]
    response = live.chat(messages=messages, stream=True, stream_options={"include_usage": True, "every": 1})
    assert response.headers["x-ignored-parameters"] == "messages.name, stream_options.every"


def test_the_header_of_ignored_fields_has_an_end(live):
    names = live.complete(**{f"{i:02}" + "x" * 100: 1 for i in range(30)}).headers["x-ignored-parameters"].split(", ")
    assert names == [f"{i:02}" + "x" * 62 for i in range(20)]


@pytest.mark.parametrize("messages", ["text", [5], [[]], {"a": 1}])
def test_an_unknown_field_may_hold_anything(live, messages):
    response = live.complete(messages=messages)
    assert response.status_code == 200
    assert "messages" in response.headers["x-ignored-parameters"]


def test_another_model_is_not_found(live):
    fields = error(live.complete(model="other"), 404)
    assert (fields["param"], fields["code"]) == ("model", "model_not_found")
    assert live.complete(model=MODEL).status_code == 200


def test_an_unknown_path_and_a_wrong_method_get_the_error_object_too(live):
    assert "/v2" in error(live.http.get("/v2"), 404)["message"]
    wrong = live.http.get("/v1/completions")
    error(wrong, 405)
    assert wrong.headers["allow"] == "POST"


def test_detokenize_refuses_ids_outside_the_vocabulary(live):
    assert error(live.http.post("/detokenize", json={"tokens": [201088]}), 400)["param"] == "tokens"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": USER},
        {"prompt": "a " * 2000},
        {"messages": [{"role": "user", "content": "a " * 2000}]},
    ],
)
def test_tokenize_takes_a_prompt_or_messages_of_at_most_the_context(live, body):
    error(live.http.post("/tokenize", json=body), 400)


def test_tokenize_takes_a_prompt_that_fills_the_context(live, tokenizer):
    text = " word" * 1024
    assert live.http.post("/tokenize", json={"prompt": text}).json()["count"] == 1024
    error(live.http.post("/tokenize", json={"prompt": text + " word"}), 400)


# --- the guard ---


def test_a_body_over_the_limit_is_refused_announced_or_not(serve):
    live = serve(FakeEngine([1]), max_body_bytes=1000)
    body = json.dumps({"prompt": "x" * 2000}).encode()
    assert error(live.http.post("/v1/completions", content=body), 413)["code"] == "body_too_large"
    chunks = (body[i : i + 100] for i in range(0, len(body), 100))
    assert error(live.http.post("/v1/completions", content=chunks), 413)["code"] == "body_too_large"
    assert live.complete().status_code == 200


def test_a_chunked_body_is_refused_before_all_of_it_has_come(serve):
    live = serve(FakeEngine([1]), max_body_bytes=1000)
    client = http.client.HTTPConnection("127.0.0.1", live.port, timeout=5)
    client.putrequest("POST", "/v1/completions")
    client.putheader("Transfer-Encoding", "chunked")
    client.endheaders()
    client.send(b"7d0\r\n" + b"x" * 2000 + b"\r\n")  # the end never follows
    assert client.getresponse().status == 413


def test_with_a_key_file_every_route_but_health_and_metrics_needs_a_key(serve, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\n\n second \n")
    live = serve(FakeEngine([1, 200002]), api_key_file=str(keys))
    for path in ("/v1/models", "/version", "/nowhere", "/healthy", "/metrics/x"):
        assert error(live.http.get(path), 401)["code"] == "invalid_api_key"
    for header in ("Bearer wrong", "Bearer", "first", "Basic first", "Bearer firstsecond", ""):
        assert live.http.get("/v1/models", headers={"Authorization": header}).status_code == 401
    assert error(live.complete(), 401)["type"] == "authentication_error"
    for path in ("/health", "/health/ready", "/metrics"):
        assert live.http.get(path).status_code == 200
    for key in ("first", "second"):
        assert live.openai(key).completions.create(model=MODEL, prompt="x").choices[0].finish_reason == "stop"


def test_a_key_file_without_a_key_stops_the_start(tmp_path):
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        create_app(FakeEngine([]), ServerConfig(api_key_file=str(tmp_path / "keys")), MODEL, Workers())


def test_an_exception_after_the_response_has_begun_sends_no_second_one(caplog):
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("late")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with caplog.at_level(logging.ERROR, "serve"):
        asyncio.run(Guard(app, Keys(None), 1000)(scope, None, send))
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert "late" in caplog.text


def test_an_unexpected_exception_is_logged_and_not_told(serve, caplog):
    def script(prompt, sampling):
        raise KeyError("secret detail")

    live = serve(FakeEngine(script))
    with caplog.at_level(logging.ERROR, "serve"):
        fields = error(live.complete(), 500)
    assert fields["message"] == "internal error"
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("name", ["f\n", "f ", "", "f" * 129])
def test_a_functions_name_is_matched_whole(live, name):
    tool = {"type": "function", "function": {"name": name}}
    assert error(live.chat(tools=[tool]), 400)["param"] == "tools[0].function.name"
    body = {"messages": USER, "max_tokens": 5, "tools": [{"name": name, "input_schema": {"type": "object"}}]}
    assert live.http.post("/v1/messages", json=body).status_code == 400


def test_a_field_of_another_endpoint_is_ignored_whatever_it_holds(live):
    answer = live.http.post("/tokenize", json={"prompt": "a", "stream_options": 5})
    assert (answer.status_code, answer.headers["x-ignored-parameters"]) == (200, "stream_options")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "Application/vnd.api+JSON", "origin": "https://a.example"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "text/plain; application/json", "origin": "https://a.example"}, 415),
        ({"origin": "https://a.example"}, 415),
    ],
)
def test_a_body_that_a_web_page_may_send_to_any_server_is_refused(serve, headers, status):
    body = b'{"prompt": "x"}'
    assert (
        serve(FakeEngine([1, 200002])).http.post("/v1/completions", content=body, headers=headers).status_code == status
    )
    allowing = serve(FakeEngine([1, 200002]), require_json_type=False)
    assert allowing.http.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_a_path_with_a_slash_too_many_is_not_redirected(live):
    answer = live.http.post("/v1/completions/", json={"prompt": "x"}, headers={"host": "evil.example"})
    assert answer.status_code == 404
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    "body", [{"model": "m" * 10**6}, {"prompt": [{"x" * 10**6: 1}]}, {"n": "x" * 10**6}], ids=["model", "key", "value"]
)
def test_an_error_repeats_little_of_what_was_sent(live, body):
    answer = live.complete(**body)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 3000
    assert len(live.http.get("/" + "x" * 9000).content) < 3000
