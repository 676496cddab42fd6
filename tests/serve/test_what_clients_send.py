"""Values, headers and forms that clients send: honoured, or accepted and named as ignored, or refused with a reason."""

import gzip
import json
import logging

import pytest

from engine.tokenizer import Tokenizer
from serve.parsing import IGNORED_HEADER
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("read.file", "write")]


@pytest.fixture
def live(serve):
    return serve(FakeEngine([1, 2, 200002]))


def prompt(live, tokenizer) -> str:
    return tokenizer.decode(live.engine.submitted[-1][0], skip_special=False)


@pytest.mark.parametrize(
    ("given", "effort"),
    [
        ({"reasoning_effort": "none"}, "low"),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "xhigh"}, "high"),
        ({"reasoning_effort": "max"}, "high"),
        ({"reasoning": {"effort": "high"}}, "high"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "low"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "low"),
        ({"chat_template_kwargs": {}}, "medium"),
    ],
)
def test_every_effort_becomes_the_nearest_that_the_model_knows(live, tokenizer, given, effort):
    assert live.chat(**given).status_code == 200
    assert f"Reasoning: {effort}" in prompt(live, tokenizer)


@pytest.mark.parametrize(
    ("field", "value"),
    [("store", True), ("verbosity", "low"), ("service_tier", "flex"), ("priority", 5), ("stream_options", {})],
)
def test_a_wish_that_has_no_effect_is_named_as_ignored(live, field, value):
    response = live.chat(**{field: value})
    assert response.status_code == 200
    assert response.headers[IGNORED_HEADER] == field


@pytest.mark.parametrize("value", [-1, 4.0])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_minus_one_is_no_limit_and_a_whole_float_is_an_integer(live, field, value):
    assert live.chat(**{field: value}).status_code == 200
    ids, sampling = live.engine.submitted[-1]
    assert sampling.max_tokens == (4 if value == 4.0 else 1024 - len(ids))


def test_a_whole_float_is_an_integer_in_every_field(live):
    assert live.complete(max_tokens=4.0, n=2.0, top_k=3.0, seed=5.0, logprobs=1.0).status_code == 200
    sampling = live.engine.submitted[-1][1]
    assert (sampling.max_tokens, sampling.top_k, sampling.logprobs) == (4, 3, 1)
    body = {"input": "Hello", "max_output_tokens": 4.0, "top_logprobs": 2.0}
    assert live.http.post("/v1/responses", json=body).status_code == 200
    sampling = live.engine.submitted[-1][1]
    assert (sampling.max_tokens, sampling.logprobs) == (4, 2)


@pytest.mark.parametrize("value", [4.5, 1e300, -4.0, "4"])
def test_other_floats_are_no_integers(live, value):
    response = live.complete(top_k=value)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "top_k")


def test_top_p_of_zero_leaves_the_likeliest_token(live):
    assert live.complete(top_p=0).status_code == 200
    sampling = live.engine.submitted[-1][1]
    assert (sampling.top_k, sampling.top_p) == (1, 1.0)


@pytest.mark.parametrize("stop", ["", [""], []])
def test_an_empty_stop_string_never_stops(live, stop):
    assert live.complete(stop=stop).json()["choices"][0]["text"] == live.complete().json()["choices"][0]["text"]


def test_an_empty_model_is_the_one_that_is_served(live):
    assert live.chat(model="").json()["model"] == MODEL


@pytest.mark.parametrize(("field", "instead"), [("functions", "tools"), ("function_call", "tool_choice")])
def test_legacy_fields_are_refused_with_what_to_use(live, field, instead):
    response = live.chat(**{field: [{"name": "f"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert f"use {instead}" in response.json()["error"]["message"]


def test_an_enum_is_refused_with_what_is_allowed(live):
    message = live.chat(reasoning_effort="extreme").json()["error"]["message"]
    efforts = {"none", "minimal", "low", "medium", "high", "xhigh", "max"}
    assert set(message.partition("allowed: ")[2].split(", ")) == efforts
    message = live.chat(messages=[{"role": "function", "content": "x"}]).json()["error"]["message"]
    roles = {"system", "developer", "user", "assistant", "tool"}
    assert set(message.partition("allowed: ")[2].split(", ")) == roles


def test_custom_tools_and_fields_without_effect_are_named(live, tokenizer):
    tool = {"type": "function", "function": {"name": "a.b", "strict": True}, "cache_control": {}}
    content = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    custom = {"type": "custom", "custom": {"name": "patch"}}
    response = live.chat(messages=[{"role": "user", "content": content}], tools=[tool, custom])
    assert response.status_code == 200, response.text
    names = response.headers[IGNORED_HEADER].split(", ")
    assert names == ["messages.content.cache_control", "tools.cache_control", "tools.custom"]
    assert "a.b" in prompt(live, tokenizer)
    assert "patch" not in prompt(live, tokenizer)


def allowed(mode: object, *names: object) -> dict:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_allowed_tools_leaves_these_alone(live, tokenizer):
    assert live.chat(tools=TOOLS, tool_choice=allowed("auto", "write")).status_code == 200
    assert "write" in prompt(live, tokenizer)
    assert "read.file" not in prompt(live, tokenizer)
    assert live.chat(tools=TOOLS, tool_choice=allowed("required", "write")).status_code == 200
    assert "to=functions.write" in prompt(live, tokenizer)


@pytest.mark.parametrize(
    "choice",
    [
        allowed("auto", "delete"),
        allowed("never", "write"),
        allowed([], "write"),
        allowed("auto", 5),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": 5}},
    ],
)
def test_allowed_tools_that_make_no_sense_are_refused(live, choice):
    response = live.chat(tools=TOOLS, tool_choice=choice)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tool_choice")


def test_usage_so_far_comes_with_every_event(live):
    options = {"include_usage": True, "continuous_usage_stats": True}
    lines = live.complete(stream=True, stream_options=options).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def test_tokens_are_named_by_id_on_demand(live):
    logprobs = live.complete(logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["token_id:1", "token_id:2"]
    assert "token_id:1" in logprobs["top_logprobs"][0]


def test_chat_names_tokens_by_id_on_demand(live):
    choice = live.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]
    entry = choice["logprobs"]["content"][0]
    assert entry["token"] == entry["top_logprobs"][0]["token"] == "token_id:1"
    assert entry["bytes"] == [34]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("content", ["Once upon", [{"type": "text", "text": "Once upon"}]])
def test_an_answer_goes_on_with_the_last_message(serve, tokenizer, content, stream):
    live = serve(FakeEngine([*tokenizer.encode(" a time"), 200002]))
    messages = [
        {"role": "user", "content": "Tell."},
        {"role": "assistant", "content": content, "reasoning_content": "A tale."},
    ]
    tools = TOOLS if stream else None  # offered or not: the text is no call
    response = live.chat(
        messages=messages, continue_final_message=True, add_generation_prompt=False, stream=stream, tools=tools
    )
    assert response.status_code == 200, response.text
    if stream:
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == " a time"
        assert not any("tool_calls" in delta for delta in deltas)
    else:
        assert response.json()["choices"][0]["message"]["content"] == " a time"
    start = "<|start|>assistant<|channel|>"
    assert prompt(live, tokenizer).endswith(f"{start}analysis<|message|>A tale.<|end|>{start}final<|message|>Once upon")


ANSWER = {"role": "assistant", "content": "Once"}
CALLING = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "write", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": [{**ANSWER, "content": ""}]}, "continue_final_message"),
        ({"continue_final_message": True, "messages": [{**ANSWER, **CALLING}]}, "continue_final_message"),
        (
            {"continue_final_message": True, "messages": [ANSWER], "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        (
            {"continue_final_message": True, "messages": [ANSWER], "tools": TOOLS, "tool_choice": "required"},
            "tool_choice",
        ),
        ({"add_generation_prompt": False, "messages": [ANSWER]}, "add_generation_prompt"),
    ],
)
def test_a_continuation_that_makes_no_sense_is_refused(live, given, param):
    response = live.chat(**given)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_byte_order_mark_is_no_error(live):
    assert live.http.post("/v1/completions", content=b'\xef\xbb\xbf{"prompt": "x"}').status_code == 200


def test_a_compressed_body_is_refused_naming_the_header(live):
    body = gzip.compress(b'{"prompt": "x"}')
    response = live.http.post("/v1/completions", content=body, headers={"content-encoding": "gzip"})
    assert (response.status_code, response.json()["error"]["param"]) == (415, "content-encoding")
    assert response.headers["content-length"] == str(len(response.content))


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v1/models", f"/v1/models/{MODEL}", "/metrics"])
def test_head_is_where_get_is(live, path):
    response = live.http.head(path)
    assert (response.status_code, response.content) == (200, b"")


def test_head_is_not_where_only_post_is(live):
    assert live.http.head("/v1/completions").status_code == 405


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/completions"])
def test_a_request_id_is_taken_over_or_made(live, path):
    assert live.http.get(path, headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = [live.http.get(path, headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("a b", "x" * 129)]
    assert all(id.startswith("req-") for id in made)
    assert made[0] != made[1]


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("failing", ["prompt", "submit", "engine"])
@pytest.mark.parametrize("body", [{}, {"stream": True}, {"stream": True, "n": 2}], ids=str)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_every_line_of_the_log_names_the_request(serve, monkeypatch, caplog, path, body, failing):
    live = serve(FakeEngine([1]))
    live.engine.break_after, live.engine.broken = 0, RuntimeError("on purpose")
    if failing == "prompt":
        monkeypatch.setattr(Tokenizer, "encode", fail)
    if failing == "submit":
        monkeypatch.setattr(live.engine, "submit", fail)
    prompts = {"/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"}}
    body = prompts.get(path, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}) | body
    with caplog.at_level(logging.INFO):
        live.http.post(path, json=body, headers={"x-request-id": "abc-1"})
    lines = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # the client's
    assert lines == [f"abc-1: POST {path} failed"]


def test_a_model_may_have_several_names(serve):
    live = serve(FakeEngine([1]), also_named=["team/gpt"])
    client = live.openai()
    assert [model.id for model in client.models.list()] == [MODEL, "team/gpt"]
    assert client.models.retrieve("team/gpt").id == "team/gpt"
    assert live.chat(model="team/gpt").status_code == 200
    assert live.http.get("/v1/models/other").status_code == 404


def test_a_preflight_passes_without_a_key_for_listed_origins_alone(serve, tmp_path):
    (tmp_path / "keys").write_text("secret")
    live = serve(FakeEngine([1]), api_key_file=str(tmp_path / "keys"), cors_origins=["https://a.example"])

    def preflight(origin: str):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return live.http.options("/v1/chat/completions", headers=headers)

    assert preflight("https://a.example").headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in preflight("https://b.example").headers
    refused = live.http.post("/v1/completions", json={}, headers={"origin": "https://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


def test_without_configuration_no_origin_is_allowed(live):
    response = live.http.get("/health", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_salt_is_the_same_for_the_same_text_and_key_alone(serve, tmp_path):
    (tmp_path / "keys").write_text("one\ntwo")
    live = serve(FakeEngine([1]), api_key_file=str(tmp_path / "keys"))
    asked = [("one", None), ("two", None), ("one", "a"), ("two", "a"), ("one", "b"), ("one", "a")]
    for key, salt in asked:
        headers = {"authorization": f"Bearer {key}"}
        body = {"prompt": "x", "cache_salt": salt}
        assert live.http.post("/v1/completions", json=body, headers=headers).status_code == 200
    salts = live.engine.salts
    assert len(set(salts)) == 5
    assert salts[2] == salts[5]
    refused = live.http.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert refused.status_code == 401


def test_a_key_salts_alike_in_whichever_header_it_comes(serve, tmp_path):
    (tmp_path / "keys").write_text("one\ntwo")
    live = serve(FakeEngine([1]), api_key_file=str(tmp_path / "keys"))
    sent = [
        {"authorization": "Bearer one"},
        {"x-api-key": "one"},
        {"x-api-key": "two"},
        {"authorization": "Bearer wrong", "x-api-key": "two"},
        {"authorization": "bearer  two", "x-api-key": "wrong"},
    ]
    for headers in sent:
        assert live.http.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 200
    one, also_one, *twos = live.engine.salts
    assert one == also_one != b""
    assert set(twos) == {twos[0]} != {one}


def test_keys_share_cached_prompts_where_the_configuration_says_so(serve, tmp_path):
    (tmp_path / "keys").write_text("one\ntwo")
    live = serve(FakeEngine([1]), api_key_file=str(tmp_path / "keys"), salt_by_key=False)
    for key in ("one", "two"):
        assert live.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-api-key": key}).status_code == 200
    assert live.engine.salts == [b"", b""]


def test_without_key_and_text_there_is_no_salt(live):
    live.chat()
    live.chat(cache_salt="a")
    live.complete(cache_salt="a")
    assert live.engine.salts[0] == b""
    assert live.engine.salts[1] == live.engine.salts[2] != b""
    assert live.chat(cache_salt="").status_code == 400
