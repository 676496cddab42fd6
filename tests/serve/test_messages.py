"""Anthropic's Messages API through its official client: create, stream, tools, thinking sent back, counts, refusals."""

import contextlib
import itertools
import json

import anthropic
import httpx
import pytest
from anthropic.types import ErrorResponse, Message, MessageTokensCount, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from conf.limits import CHANNEL
from serve.conversation import sealed
from serve.harmony import Call, Function, Turn, any_call_header, call_header, render
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL, TODAY
from tests.serve.strategies import ANSWER, CALLS, NEXT, PREAMBLE, THINKS, changed, pieces

USER = [{"role": "user", "content": "Weather in Oslo?"}]
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [
    {"name": "get_weather", "description": "Weather.", "input_schema": SCHEMA},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]
FUNCTIONS = [Function("get_weather", "Weather.", SCHEMA), Function("now", "", {"type": "object", "properties": {}})]

THINKING = {"type": "adaptive"}

EVENT, ERROR, MESSAGE = TypeAdapter(RawMessageStreamEvent), TypeAdapter(ErrorResponse), TypeAdapter(Message)


def client(live, key="none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"http://127.0.0.1:{live.port}", api_key=key, max_retries=0)


def create(live, **body) -> Message:
    return client(live).messages.create(**{"model": MODEL, "max_tokens": 500, "messages": USER, **body})


def post(live, **body):
    return live.http.post("/v1/messages", json={"max_tokens": 500, "messages": USER, **body})


def events(response) -> list[dict]:
    """The events of a stream, each valid, its type the same in both places, the pings taken out."""
    parsed = []
    for entry in response.text.split("\n\n")[:-1]:
        name, data = entry.split("\n", 1)
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event, strict=True)
            parsed.append(event)
    return parsed


def assembled(streamed: list[dict]) -> dict:
    """The message that a stream's events make, with the rules of the API checked; inputs are left as texts."""
    first, *middle, delta, stop = streamed
    assert (first["type"], delta["type"], stop["type"]) == ("message_start", "message_delta", "message_stop")
    message = first["message"] | delta["delta"] | {"usage": delta["usage"], "content": []}
    is_open = False
    for event in middle:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append(dict(event["content_block"]))
            is_open = True
            continue
        assert is_open
        assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        change = event["delta"]
        kind = {"text_delta": "text", "input_json_delta": "tool_use"}.get(change["type"], "thinking")
        assert block["type"] == kind
        field = {"input_json_delta": "partial_json"}.get(change["type"], change["type"].removesuffix("_delta"))
        name = "input" if field == "partial_json" else field
        block[name] = (block[name] or "") + change[field]
    assert not is_open
    return message


def with_inputs(message: dict) -> dict:
    """Inputs as a reply that is not streamed has them."""

    def input_of(text) -> dict:
        value = None
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(text or "{}")
            json.dumps(read, allow_nan=False)  # raises ValueError for 1e999, which no client can read
            value = read
        return value if isinstance(value, dict) else {"INVALID_JSON": text}

    content = [b | {"input": input_of(b["input"])} if b["type"] == "tool_use" else b for b in message["content"]]
    return message | {"content": content}


def anonymous(message: dict) -> dict:
    """Without what is drawn anew for every reply."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return message | {"id": "", "content": content}


# --- replies ---


def test_a_message_has_its_thinking_and_its_text_as_blocks(serve, harmony):
    message = create(serve(FakeEngine(harmony(ANSWER))), thinking=THINKING)
    thinking, text = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "Look it up.")
    assert thinking.signature
    assert (text.type, text.text) == ("text", "It is cold, say they.")
    assert (message.type, message.role, message.model, message.stop_reason) == (
        "message",
        "assistant",
        MODEL,
        "end_turn",
    )
    assert message.stop_sequence is None


def test_usage_counts_what_the_cache_gave_apart(serve, harmony):
    live = serve(FakeEngine(harmony(ANSWER)))
    usage = create(live).usage
    (prompt, _), answer = live.engine.submitted[0], harmony(ANSWER)
    assert usage.cache_read_input_tokens == 3
    assert usage.input_tokens == len(prompt) - 3
    assert usage.output_tokens == len(answer)
    assert usage.output_tokens_details.thinking_tokens == 4


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_a_stream_through_the_client_is_the_whole_message(serve, harmony, step):
    engine = FakeEngine(harmony(THINKS + PREAMBLE + CALLS))
    engine.step = step
    live = serve(engine)
    whole = create(live, tools=TOOLS, thinking=THINKING)
    body = {"model": MODEL, "max_tokens": 500, "messages": USER, "tools": TOOLS, "thinking": THINKING}
    with client(live).messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    assert anonymous(streamed.to_dict(mode="json")) | {"usage": 0} == anonymous(whole.to_dict(mode="json")) | {
        "usage": 0
    }
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert streamed.usage.input_tokens == whole.usage.input_tokens
    assert streamed.usage.cache_read_input_tokens == whole.usage.cache_read_input_tokens == 3


def test_a_stream_has_the_events_of_the_api_in_order(serve, harmony):
    live = serve(FakeEngine(harmony(ANSWER)))
    response = post(live, thinking=THINKING, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    kinds = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert kinds[:2] == ["message_start", "ping"]
    streamed = events(response)
    changes = [event["delta"]["type"] for event in streamed if event["type"] == "content_block_delta"]
    assert list(dict.fromkeys(changes)) == ["thinking_delta", "signature_delta", "text_delta"]
    assert len(changes) > 5
    assert kinds[-2:] == ["message_delta", "message_stop"]


def test_every_message_of_the_model_is_a_block_in_its_order(serve, harmony):
    second = f"<|channel|>analysis<|message|>And the time.{NEXT}"
    time = "<|channel|>commentary to=functions.now<|message|>{}<|call|>"
    live = serve(FakeEngine(harmony(THINKS + PREAMBLE + second + CALLS.replace("<|call|>", NEXT) + time)))
    message = create(live, tools=TOOLS, thinking=THINKING)
    assert [block.type for block in message.content] == ["thinking", "text", "thinking", "tool_use", "tool_use"]
    assert [block.input for block in message.content[3:]] == [{"place": "Oslo"}, {}]
    assert len({block.id for block in message.content[3:]}) == 2
    assert message.stop_reason == "tool_use"


def test_an_answer_cut_by_max_tokens_says_so(serve, harmony):
    message = create(serve(FakeEngine(harmony(ANSWER))), max_tokens=5, thinking=THINKING)
    assert [block.type for block in message.content] == ["thinking"]
    assert message.stop_reason == "max_tokens"


def test_an_answer_cut_by_the_context_says_so_and_is_not_refused(serve, harmony):
    live = serve(FakeEngine(harmony("<|channel|>final<|message|>" + "go " * 1000)))
    message = create(live, max_tokens=20_000)
    (prompt, sampling), *_ = live.engine.submitted
    assert sampling.max_tokens == 1024 - len(prompt)
    assert message.stop_reason == "model_context_window_exceeded"
    response = post(live, messages=[{"role": "user", "content": "word " * 2000}])
    assert response.status_code == 400
    assert "1024" in response.json()["error"]["message"]


@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stop_sequence_ends_the_answer_and_is_named(serve, harmony, step):
    engine = FakeEngine(harmony(ANSWER.replace("Look it up", "It is cold")))
    engine.step = step
    live = serve(engine)
    whole = create(live, stop_sequences=["warm", "cold"], thinking=THINKING)
    assert whole.content[0].thinking == "It is cold."  # not looked for in reasoning
    assert whole.content[1].text == "It is "
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", "cold")
    message = assembled(events(post(live, stop_sequences=["warm", "cold"], thinking=THINKING, stream=True)))
    assert message["content"][1]["text"] == "It is "
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "cold")


def test_text_that_only_begins_a_stop_sequence_is_shown(serve, harmony):
    live = serve(FakeEngine(harmony(PREAMBLE + "<|channel|>final<|message|>Cold<|return|>")))
    message = create(live, stop_sequences=["moment. More", "Colder"])
    assert [block.text for block in message.content] == ["One moment.", "Cold"]
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize("thinking", [{}, {"thinking": {"type": "disabled"}}])
def test_thinking_that_was_not_asked_for_is_not_shown(serve, harmony, thinking):
    live = serve(FakeEngine(harmony(ANSWER)))
    message = create(live, **thinking)
    assert [block.type for block in message.content] == ["text"]
    assert message.usage.output_tokens_details.thinking_tokens == 4
    streamed = assembled(events(post(live, **thinking, stream=True)))
    assert [block["type"] for block in streamed["content"]] == ["text"]


def test_a_stream_says_now_and_then_that_the_model_is_still_thinking(serve, harmony):
    live = serve(FakeEngine(harmony(THINKS.replace("it", "it " * 500) + "<|channel|>final<|message|>Cold.<|return|>")))
    for thinking in (None, THINKING | {"display": "omitted"}):
        text = post(live, max_tokens=900, thinking=thinking, stream=True).text
        assert 3 <= text.count("event: ping") <= 5
    assert post(live, max_tokens=900, thinking=THINKING, stream=True).text.count("event: ping") == 1


# --- tools ---


def test_a_call_of_several_turns_with_thinking_sent_back(serve, harmony, tokenizer):
    replies = iter([THINKS + PREAMBLE + CALLS, ANSWER])
    live = serve(FakeEngine(lambda prompt, sampling: harmony(next(replies))))
    first = create(live, system="Be brief.", tools=TOOLS, thinking=THINKING)
    assert first.stop_reason == "tool_use"
    call = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "-5"}]}
    history = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = create(live, system="Be brief.", tools=TOOLS, messages=history, thinking=THINKING)
    assert second.content[-1].text == "It is cold, say they."
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Weather in Oslo?"),
        Turn("assistant", "One moment.", "Look it up.", (Call("get_weather", '{"place":"Oslo"}'),)),
        Turn("tool", "-5", name="get_weather"),
    ]
    assert live.engine.submitted[1][0] == render(turns, "medium", TODAY, tokenizer, 10**6, FUNCTIONS)
    assert "Look it up." in tokenizer.decode(live.engine.submitted[1][0], False)


TIME = "<|channel|>commentary to=functions.now<|message|>{}<|call|>"
AGAIN = f"<|channel|>analysis<|message|>And the time.{NEXT}"


@pytest.mark.parametrize(
    "written",
    [
        THINKS + CALLS,
        THINKS + PREAMBLE + CALLS,
        PREAMBLE + THINKS + AGAIN + CALLS,
        THINKS + PREAMBLE + AGAIN + CALLS,
        THINKS + CALLS.replace("<|call|>", NEXT) + TIME,
        THINKS + CALLS.replace("<|call|>", NEXT) + AGAIN + TIME,
        THINKS + CALLS.replace("<|call|>", NEXT) + PREAMBLE + AGAIN + TIME,
        CALLS,
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_thinking_that_was_not_shown_is_told_to_the_model_as_if_it_had_come_back(serve, harmony, written, stream):
    live = serve(FakeEngine(harmony(written)))
    prompts = []
    for thinking in (None, {"type": "disabled"}, THINKING):
        effort = {"output_config": {"effort": "low"}, "thinking": thinking}
        response = post(live, tools=TOOLS, stream=stream, **effort)
        content = with_inputs(assembled(events(response)))["content"] if stream else response.json()["content"]
        assert (thinking is THINKING and "analysis" in written) == ("thinking" in {block["type"] for block in content})
        calls = [block for block in content if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "-5"} for call in calls]
        history = [*USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
        assert post(live, tools=TOOLS, messages=history, **effort).status_code == 200
        prompt = live.engine.submitted[-1][0]
        prompts.append(prompt)
        count = {"tools": TOOLS, "messages": history, **effort}
        assert live.http.post("/v1/messages/count_tokens", json=count).json() == {"input_tokens": len(prompt)}
        # Only while the loop of calls goes on, which a final answer ends.
        ended = [*history, {"role": "assistant", "content": "Cold."}, *USER]
        post(live, tools=TOOLS, messages=ended, **effort)
        assert harmony("analysis<|message|>")[0] not in [
            after for before, after in itertools.pairwise(live.engine.submitted[-1][0]) if before == CHANNEL
        ]
    assert prompts[0] == prompts[1] == prompts[2]


def test_thinking_that_was_not_shown_is_kept_within_bounds_and_for_its_owner(serve, harmony, tokenizer, tmp_path):
    (tmp_path / "keys").write_text("one\ntwo\n")

    def told(live, key, call, repeat=1) -> int:
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "-5"}
        turn = [{"role": "assistant", "content": [call] * repeat}, {"role": "user", "content": [result]}]
        client(live, key).messages.create(model=MODEL, max_tokens=5, messages=[*USER, *turn], tools=TOOLS)
        return tokenizer.decode(live.engine.submitted[-1][0], False).count("Look it up.")

    def call_of(live):
        return client(live, "one").messages.create(model=MODEL, max_tokens=500, messages=USER, tools=TOOLS).content[-1]

    live = serve(FakeEngine(harmony(THINKS + CALLS)), api_key_file=str(tmp_path / "keys"), stored_responses=2)
    first = call_of(live)
    assert told(live, "one", first) == 1
    assert told(live, "one", first, repeat=3) == 1
    assert told(live, "two", first) == 0
    for _ in range(2):
        call_of(live)
    assert told(live, "one", first) == 0  # the oldest went
    off = serve(FakeEngine(harmony(THINKS + CALLS)), api_key_file=str(tmp_path / "keys"), stored_responses=0)
    assert told(off, "one", call_of(off)) == 0


def test_the_thinking_of_a_finished_turn_is_not_told_again(serve, harmony, tokenizer):
    replies = iter([ANSWER, ANSWER])
    live = serve(FakeEngine(lambda prompt, sampling: harmony(next(replies))))
    first = create(live, thinking=THINKING)
    create(live, messages=[*USER, {"role": "assistant", "content": first.content}, *USER])
    assert "Look it up." not in tokenizer.decode(live.engine.submitted[1][0], False)


def test_thinking_that_is_not_shown_comes_back_in_its_signature(serve, harmony, tokenizer):
    replies = iter([THINKS + CALLS, THINKS + CALLS, ANSWER])
    live = serve(FakeEngine(lambda prompt, sampling: harmony(next(replies))))
    omitted = {"type": "adaptive", "display": "omitted"}
    streamed = assembled(events(post(live, tools=TOOLS, thinking=omitted, stream=True)))
    first = create(live, tools=TOOLS, thinking=omitted)
    assert first.content[0].thinking == ""
    assert first.content[0].signature == streamed["content"][0]["signature"] == sealed("Look it up.")
    result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "-5"}
    history = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    create(live, tools=TOOLS, messages=history)
    assert "analysis<|message|>Look it up." in tokenizer.decode(live.engine.submitted[2][0], False)


@pytest.mark.parametrize("signature", ["sealed:%", "sealed:/w==", "EqQBCgIYAhIM1gbcDa9GJwZA2b3h", ""])
def test_thinking_from_elsewhere_is_accepted_with_any_signature(serve, harmony, signature):
    live = serve(FakeEngine(harmony(ANSWER)))
    blocks = [
        {"type": "thinking", "thinking": "", "signature": signature},
        {"type": "redacted_thinking", "data": "abc"},
        {"type": "text", "text": "Cold."},
    ]
    assert post(live, messages=[*USER, {"role": "assistant", "content": blocks}, *USER]).status_code == 200


@pytest.mark.parametrize(
    ("choice", "header"),
    [
        ({"type": "tool", "name": "get_weather"}, "get_weather"),
        ({"type": "any"}, None),
        ({"type": "auto"}, ""),
        ({"type": "none"}, ""),
    ],
)
def test_a_demanded_call_is_prefilled(serve, harmony, tokenizer, choice, header):
    written = {"get_weather": '{"place": "Oslo"}', None: '.get_weather <|constrain|>json<|message|>{"place": "Oslo"}'}
    live = serve(FakeEngine(harmony(written.get(header, THINKS + CALLS))))
    message = create(live, tools=TOOLS, tool_choice=choice)
    functions = [] if choice["type"] == "none" else FUNCTIONS
    prompt = render([Turn("user", "Weather in Oslo?")], "medium", TODAY, tokenizer, 10**6, functions)
    if header != "":
        prompt += call_header(tokenizer, header) if header else any_call_header(tokenizer)
    assert live.engine.submitted[0][0] == prompt
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [call.input for call in calls] == ([] if choice["type"] == "none" else [{"place": "Oslo"}])


def test_without_parallel_calls_the_answer_ends_before_the_second(serve, harmony):
    live = serve(FakeEngine(harmony(CALLS.replace("<|call|>", NEXT) + CALLS)))
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    for several, number in ((False, 1), (True, 2)):
        message = create(live, tools=TOOLS, tool_choice=choice | {"disable_parallel_tool_use": not several})
        assert [block.type for block in message.content] == ["tool_use"] * number
        assert message.stop_reason == "tool_use"
    assert live.engine.aborted == [0]


def test_a_call_of_what_was_not_offered_is_told_as_text(serve, harmony):
    for whom, text in (("python", "print(1)"), ("functions.other", "{}")):
        live = serve(FakeEngine(harmony(f"<|channel|>commentary to={whom} code<|message|>{text}<|call|>")))
        message = create(live, tools=TOOLS)
        (block,) = message.content
        assert whom in block.text
        assert block.text.endswith(text)
        assert message.stop_reason == "end_turn"


def test_a_function_may_have_a_name_of_128_characters(serve, harmony):
    name = "mcp__" + "server_tool" * 11 + "__"
    assert len(name) == 128
    live = serve(FakeEngine(harmony(CALLS.replace("get_weather", name))))
    message = create(live, tools=[TOOLS[1] | {"name": name}])
    assert [block.name for block in message.content] == [name]


def test_arguments_that_are_no_object_are_told_and_go_back_as_they_were(serve, harmony, tokenizer):
    broken = CALLS.replace('{"place": "Oslo"}', '{"place": Oslo')
    live = serve(FakeEngine(harmony(broken)))
    message = create(live, tools=TOOLS)
    assert message.content[0].input == {"INVALID_JSON": '{"place": Oslo'}
    result = {"type": "tool_result", "tool_use_id": message.content[0].id, "content": "what?", "is_error": True}
    history = [*USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    create(live, tools=TOOLS, messages=history)
    told = tokenizer.decode(live.engine.submitted[1][0], False)
    assert '<|message|>{"place": Oslo<|call|>' in told
    assert "to=assistant<|message|>Error: what?<|end|>" in told


def test_anthropics_own_tools_are_left_out_and_named(serve, harmony):
    live = serve(FakeEngine(harmony(ANSWER)))
    web = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    marked = TOOLS[0] | {"cache_control": {"type": "ephemeral"}, "type": "custom"}
    response = post(live, tools=[marked, TOOLS[1], web])
    assert response.headers["x-ignored-parameters"] == "tools.cache_control, tools.web_search_20250305"
    plain = post(live, tools=TOOLS)
    assert "x-ignored-parameters" not in plain.headers
    assert live.engine.submitted[0][0] == live.engine.submitted[1][0]


def test_a_value_that_this_api_has_is_not_named_as_ignored_because_another_api_lacks_it(serve):
    live = serve(FakeEngine([]))
    assert "x-ignored-parameters" not in post(live, service_tier="standard_only").headers


# --- the prompt ---


def test_every_form_of_text_reaches_the_prompt(serve, harmony, tokenizer):
    live = serve(FakeEngine(harmony(ANSWER)))
    mark = {"cache_control": {"type": "ephemeral"}}
    body = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=1f;"},
            {"type": "text", "text": "Be brief."},
        ],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "One <|end|>"}, {"type": "text", "text": "two", **mark}],
            },
            {"role": "assistant", "content": []},
            {"role": "system", "content": "Hurry."},
            {"role": "user", "content": "three"},
        ],
        "output_config": {"effort": "max"},
        "metadata": {"user_id": "me"},
        "context_management": {},
    }
    response = post(live, **body)
    assert response.headers["x-ignored-parameters"] == (
        "context_management, messages.content.cache_control, system.x-anthropic-billing-header"
    )
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "One <|end|>\n\ntwo"),
        Turn("system", "Hurry."),
        Turn("user", "three"),
    ]
    assert live.engine.submitted[0][0] == render(turns, "high", TODAY, tokenizer, 10**6)


@pytest.mark.parametrize(
    ("body", "effort"),
    [
        ({}, "medium"),
        ({"thinking": {"type": "disabled"}}, "low"),
        ({"thinking": {"type": "adaptive"}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10_000}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}, "output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "xhigh"}}, "high"),
    ],
)
def test_the_budget_of_thinking_is_an_effort(serve, harmony, tokenizer, body, effort):
    live = serve(FakeEngine(harmony(ANSWER)))
    assert post(live, **body).status_code == 200
    prompt = render([Turn("user", "Weather in Oslo?")], effort, TODAY, tokenizer, 10**6)
    assert live.engine.submitted[0][0] == prompt


def test_a_last_message_of_the_assistant_is_gone_on_with(serve, harmony, tokenizer):
    live = serve(FakeEngine(harmony(" cold.<|return|>")))
    message = create(live, messages=[*USER, {"role": "assistant", "content": "It is"}])
    assert [block.text for block in message.content] == [" cold."]
    prompt = tokenizer.decode(live.engine.submitted[0][0], False)
    assert prompt.endswith("<|start|>assistant<|channel|>final<|message|>It is")


def test_sampling_parameters_reach_the_engine(serve, harmony):
    live = serve(FakeEngine(harmony(ANSWER)))
    assert post(live, temperature=0.5, top_p=0.25, top_k=7, max_tokens=9).status_code == 200
    sampling = live.engine.submitted[0][1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.25, 7, 9)
    assert sampling.stop_token_ids == (200002, 199999, 200012)


@pytest.mark.parametrize("extra", [{}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": {"type": "any"}}])
def test_count_tokens_counts_what_the_message_is_charged(serve, harmony, extra):
    live = serve(FakeEngine(harmony(ANSWER)))
    count = client(live).messages.count_tokens(model=MODEL, messages=USER, system="Be brief.", **extra)
    usage = create(live, system="Be brief.", **extra).usage
    assert isinstance(count, MessageTokensCount)
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_an_empty_model_is_the_one_that_is_served(serve, harmony):
    live = serve(FakeEngine(harmony(ANSWER)))
    assert post(live, model="").json()["model"] == MODEL
    count = {"model": "", "messages": USER}
    assert live.http.post("/v1/messages/count_tokens", json=count).status_code == 200


def test_count_tokens_counts_beyond_the_context(serve, harmony):
    live = serve(FakeEngine([]))
    long = [{"role": "user", "content": "word " * 3000}]
    assert client(live).messages.count_tokens(model=MODEL, messages=long).input_tokens > 3000


def test_whole_floats_are_integers(serve, harmony):
    live = serve(FakeEngine(harmony("<|channel|>final<|message|>Hi.<|return|>")))
    answer = post(live, max_tokens=64.0, top_k=3.0, thinking={"type": "enabled", "budget_tokens": 5000.0})
    assert answer.status_code == 200, answer.text
    sampling = live.engine.submitted[-1][1]
    assert (sampling.max_tokens, sampling.top_k) == (64, 3)


# --- refusals ---


def refusal(response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    error = ERROR.validate_json(response.content, strict=True)
    assert set(response.json()) == {"type", "error"}
    assert error.error.type == kind
    return error.error.message


def user(*blocks) -> list[dict]:
    return [{"role": "user", "content": list(blocks)}]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": user({"type": "image", "source": {"type": "url", "url": "x"}})}, "'image' are not supported"),
        ({"messages": user({"type": "document", "source": {}})}, "'document' are not supported"),
        ({"messages": user({"type": "video"})}, "video"),
        ({"messages": user({"type": "text"})}, "text"),
        ({"messages": user({"type": "tool_use", "id": "1", "name": "f", "input": {}})}, "messages[0].content"),
        ({"messages": user({"type": "tool_result", "tool_use_id": "t9", "content": "x"})}, "'t9'"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        (
            {
                "tools": [
                    {"type": "bash_20250124", "name": "bash"},
                    {"name": "a", "input_schema": {"properties": {"x": {"$ref": "#/no"}}}},
                ]
            },
            "tools[1].input_schema.properties.x",
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "'other'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"system": [{"type": "image"}]}, "system"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(serve, body, says):
    live = serve(FakeEngine([]))
    assert says in refusal(post(live, **body), 400, "invalid_request_error")
    assert live.engine.submitted == []


def test_a_thread_is_refused_so_that_the_client_sends_the_whole_conversation(serve, harmony, tokenizer):
    """The client's own loop of tools sends only what is new in a thread, unless the server cannot keep one."""
    call = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"place": "Oslo"}<|call|>'
    answers = iter([harmony(call), harmony("<|channel|>final<|message|>Cold.<|return|>")])
    live = serve(FakeEngine(lambda *_: next(answers)))
    thread = {"type": "continue", "previous_message_id": "msg_1"}
    assert "thread" in refusal(post(live, thread=thread), 400, "invalid_request_error")

    @anthropic.beta_tool
    def weather(place: str) -> str:
        """Weather."""
        return f"-5 in {place}"

    runner = client(live).beta.messages.tool_runner(model=MODEL, max_tokens=500, tools=[weather], messages=USER)
    assert [[block.type for block in message.content] for message in runner] == [["tool_use"], ["text"]]
    told = tokenizer.encoding.decode(live.engine.submitted[-1][0])
    assert USER[0]["content"] in told
    assert "-5 in Oslo" in told


def test_images_in_the_answer_to_a_call_are_refused(serve):
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "image", "source": {}}]}
    history = [*USER, {"role": "assistant", "content": [call]}, *user(result)]
    assert "image" in refusal(post(serve(FakeEngine([])), messages=history), 400, "invalid_request_error")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'{"messages": NaN}', b'{"messages": "\xff"}', b"[" * 100_000]
)
def test_a_body_that_is_no_json_object_is_refused(serve, path, body):
    refusal(serve(FakeEngine([])).http.post(path, content=body), 400, "invalid_request_error")


def test_refusals_before_the_route_have_the_same_shape(serve):
    live = serve(FakeEngine([1, 200002]), max_body_bytes=1000, max_queue=1)
    refusal(live.http.get("/v1/messages"), 405, "invalid_request_error")
    refusal(live.http.post("/v1/messages/batches"), 404, "not_found_error")
    refusal(post(live, model="claude-opus-5"), 404, "not_found_error")
    refusal(post(live, system="x" * 2000), 413, "invalid_request_error")
    live.engine.running = {5}
    assert int(post(live).headers["retry-after"]) > 0
    refusal(post(live), 429, "rate_limit_error")
    live.app.state.draining = True
    refusal(post(live), 503, "overloaded_error")
    assert "param" in live.complete().json()["error"]  # OpenAI's endpoints keep theirs


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_midway_is_told_in_the_same_shape(serve, harmony, stream):
    engine = FakeEngine(harmony(ANSWER))
    engine.break_after = 8
    live = serve(engine)
    with pytest.raises(anthropic.APIStatusError, match="out of pages"):
        list(create(live, stream=stream))
    response = post(live, stream=stream)
    if stream:
        name, data = response.text.strip().split("\n\n")[-1].split("\n")
        assert name == "event: error"
        error = ERROR.validate_json(data.removeprefix("data: "), strict=True).error
        assert (error.type, error.message) == ("api_error", "out of pages")
    else:
        refusal(response, 500, "api_error")


def test_a_request_that_takes_too_long_is_told_so(serve, harmony):
    engine = FakeEngine(harmony(ANSWER))
    engine.delay = 0.05
    live = serve(engine, request_timeout=0.1)
    refusal(post(live), 504, "timeout_error")
    assert '"timeout_error"' in post(live, stream=True).text
    assert engine.running == set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts_its_request(serve, harmony, stream):
    engine = FakeEngine(harmony("<|channel|>final<|message|>" + "go " * 900), max_context=5000)
    engine.delay = 0.005
    live = serve(engine)
    body = {"max_tokens": 2000, "messages": USER, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        live.http.stream("POST", "/v1/messages", json=body, timeout=0.1) as response,
    ):
        next(response.iter_text())
    live.eventually(lambda: engine.aborted == [0])
    assert engine.running == set()


def test_a_key_may_come_in_either_header(serve, harmony, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    live = serve(FakeEngine(harmony(ANSWER)), api_key_file=str(keys))
    for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"Authorization": "Bearer wrong"}):
        response = live.http.post("/v1/messages", json={}, headers=headers)
        refusal(response, 401, "authentication_error")
    for headers in ({"x-api-key": "first"}, {"Authorization": "Bearer second"}):
        response = live.http.post("/v1/messages", json={"max_tokens": 5, "messages": USER}, headers=headers)
        assert response.status_code == 200
    assert client(live, "second").messages.create(model=MODEL, max_tokens=50, messages=USER).content
    with pytest.raises(anthropic.AuthenticationError):
        client(live, "third").messages.create(model=MODEL, max_tokens=5, messages=USER)


# --- whatever comes ---

EXAMPLES = 100
REFUSED = (400, "invalid_request_error")

PIECES = pieces(
    *("stop", " to=functions.now", " to=python", '{"a": 1}', '{"a": 1e999}'), f"<|channel|>final<|message|>sto{NEXT}"
)


def test_whatever_the_model_writes_a_stream_is_the_whole_message(serve, harmony):
    tokens: list[int] = []
    engine = FakeEngine(lambda prompt, sampling: tokens)
    live = serve(engine)

    @settings(max_examples=EXAMPLES)
    @given(
        pieces=PIECES,
        step=st.integers(1, 9),
        parallel=st.booleans(),
        thinking=st.sampled_from([None, {"type": "disabled"}, THINKING, THINKING | {"display": "omitted"}]),
        choice=st.sampled_from(["auto", "any", "none"]),
        most=st.integers(1, 200),
    )
    def holds(pieces, step, parallel, thinking, choice, most):
        tokens[:] = [token for piece in pieces for token in ([piece] if isinstance(piece, int) else harmony(piece))]
        engine.step = step
        body = {
            "tools": TOOLS,
            "tool_choice": {"type": choice, "disable_parallel_tool_use": not parallel},
            "thinking": thinking,
            "stop_sequences": ["stop"],
            "max_tokens": most,
        }
        whole = post(live, **body)
        assert whole.status_code == 200, whole.text
        MESSAGE.validate_json(whole.content, strict=True)
        streamed = assembled(events(post(live, **body, stream=True)))
        assert anonymous(with_inputs(streamed)) == anonymous(whole.json())
        content = whole.json()["content"]
        calls = [block["id"] for block in content if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": id, "content": "x"} for id in calls]
        history = [*USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
        sent_back = post(live, messages=history)
        assert sent_back.status_code == 200, sent_back.text

    holds()


BLOCKS = [
    {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
    {"type": "thinking", "thinking": "t", "signature": "sealed:dA=="},
    {"type": "redacted_thinking", "data": "d"},
    {"type": "tool_use", "id": "t1", "name": "now", "input": {"a": 1}},
    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "x"}], "is_error": True},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}},
]
BODY = {
    "model": MODEL,
    "max_tokens": 5,
    "system": [BLOCKS[0]],
    "messages": [
        *USER,
        {"role": "assistant", "content": BLOCKS[:4]},
        {"role": "user", "content": [BLOCKS[4], BLOCKS[0]]},
    ],
    "tools": [*TOOLS, {"type": "web_search_20250305", "name": "web_search"}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 2000},
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
    "temperature": 1,
    "stream": False,
}


def test_whatever_the_client_sends_it_gets_an_answer_or_a_refusal(serve, harmony):
    live = serve(FakeEngine(harmony(ANSWER)))

    @settings(max_examples=EXAMPLES)
    @given(body=changed(BODY, [*BLOCKS, BODY["messages"], TOOLS, BLOCKS]))
    def holds(body):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            response = live.http.post(path, content=json.dumps(body))
            if response.status_code != 200:
                assert refusal(response, *((404, "not_found_error") if response.status_code == 404 else REFUSED))

    holds()
