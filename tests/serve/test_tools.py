"""Calls of functions through the official client: streamed or not, demanded or free, and the prompt."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.harmony import Call, Function, Turn, any_call_header, call_header, render
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL, TODAY

USER = [{"role": "user", "content": "Weather in Oslo?"}]
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
FUNCTIONS = [Function("get_weather", "Weather.", PARAMETERS), Function("now", "", None)]
THINKS = "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant"
CALLS = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"place": "Oslo"}<|call|>'


@pytest.fixture
def calling(harmony):
    return FakeEngine(harmony(THINKS + CALLS))


def test_a_call(serve, calling):
    choice = serve(calling).openai().chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.reasoning_content == "Look it up."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"place": "Oslo"}
    assert call.id.startswith("call_")


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_a_streamed_call_says_the_same_however_its_tokens_arrive(serve, calling, step):
    calling.step = step
    stream = serve(calling).openai().chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [(call.index, bool(call.id), call.function.name) for call in calls[:1]] == [(0, True, "get_weather")]
    assert all(call.index == 0 and call.id is None and call.function.name is None for call in calls[1:])
    assert json.loads("".join(call.function.arguments for call in calls)) == {"place": "Oslo"}
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]


def test_what_the_model_is_told_of_functions_calls_and_answers(serve, tokenizer, harmony):
    live = serve(FakeEngine(harmony("<|channel|>final<|message|>Cold.<|return|>")))
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Oslo"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "I shall look.", "reasoning_content": "Look it up.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "-5"},
    ]
    answer = live.openai().chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "Cold."
    assert answer.choices[0].message.tool_calls is None
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Weather in Oslo?"),
        Turn("assistant", "I shall look.", "Look it up.", (Call("get_weather", '{"place": "Oslo"}'),)),
        Turn("tool", "-5", name="get_weather"),
    ]
    prompt = render(turns, "medium", TODAY, tokenizer, 10**6, FUNCTIONS)
    assert live.engine.submitted[0][0] == prompt
    assert live.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"] == prompt


def test_without_a_choice_of_tools_none_is_offered_and_none_is_called(serve, calling, tokenizer):
    live = serve(calling)
    plain = render([Turn("user", "Weather in Oslo?")], "medium", TODAY, tokenizer, 10**6)
    for offer in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = live.chat(messages=USER, **offer).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert live.engine.submitted[-1][0] == plain


@pytest.mark.parametrize(
    ("tool_choice", "tools", "header", "answer"),
    [
        ({"type": "function", "function": {"name": "get_weather"}}, TOOLS, "get_weather", '{"place": "Oslo"}<|call|>'),
        ("required", TOOLS[:1], "get_weather", '{"place": "Oslo"}<|call|>'),
        ("required", TOOLS, None, '.get_weather <|constrain|>json<|message|>{"place": "Oslo"}<|call|>'),
    ],
)
@pytest.mark.parametrize("step", [1, 100])
def test_a_demanded_call_is_prefilled(serve, harmony, tokenizer, tool_choice, tools, header, answer, step):
    engine = FakeEngine(harmony(answer))
    engine.step = step
    live = serve(engine)
    prefilled = call_header(tokenizer, header) if header else any_call_header(tokenizer)
    ask = {"messages": USER, "tools": tools, "tool_choice": tool_choice}
    choice = live.chat(**ask).json()["choices"][0]
    assert engine.submitted[0][0][-len(prefilled) :] == prefilled
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"place": "Oslo"}'}
    assert choice["finish_reason"] == "tool_calls"


def test_a_call_cut_short_is_told_as_far_as_it_came(serve, calling, harmony):
    most = len(harmony(THINKS + CALLS)) - 3  # without <|call|> and the last of the arguments
    choice = serve(calling).chat(messages=USER, tools=TOOLS, max_tokens=most).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments
    assert '{"place": "Oslo"}'.startswith(arguments)
    assert arguments != '{"place": "Oslo"}'


@pytest.mark.parametrize(("parallel", "names"), [(None, ["now", "get_weather"]), (False, ["now"])])
def test_several_calls_of_one_turn(serve, harmony, parallel, names):
    first = "<|channel|>analysis to=functions.now<|message|><|end|><|start|>assistant"  # on any channel, without words
    live = serve(FakeEngine(harmony(first + CALLS)))
    choice = live.chat(messages=USER, tools=TOOLS, parallel_tool_calls=parallel).json()["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == names
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == ""
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == len(names)


PIECES = st.lists(
    st.sampled_from(
        [
            "<|channel|>",
            "<|message|>",
            "<|end|>",
            "<|start|>",
            "<|constrain|>",
            "assistant",
            "commentary",
            "analysis",
            "final",
            " to=functions.now",
            " to=functions.get_weather",
            " to=python",
            "json",
            "{}",
            '{"a": 1}',
            "text",
            "\U0001f9d1",
            " ",
        ]
    ),
    max_size=25,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES, step=st.integers(1, 9))
def test_whatever_the_model_says_deltas_add_up_to_the_message(serve, harmony, pieces, step):
    tokens = [token for piece in pieces for token in harmony(piece)] + [200012]
    engine = FakeEngine(tokens)
    engine.step = step
    live = serve(engine)
    whole = live.chat(messages=USER, tools=TOOLS).json()["choices"][0]
    content, reasoning, calls, finish = "", "", [], None
    for line in live.chat(messages=USER, tools=TOOLS, stream=True).text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        content += choice["delta"].get("content") or ""
        reasoning += choice["delta"].get("reasoning") or ""
        finish = choice["finish_reason"] or finish
        for call in choice["delta"].get("tool_calls", []):
            if call["index"] == len(calls):
                assert call["id"]
                calls.append({"name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    message = whole["message"]
    assert (content or None, reasoning or None, finish) == (
        message["content"],
        message["reasoning"],
        whole["finish_reason"],
    )
    assert calls == [call["function"] for call in message.get("tool_calls", [])]
    assert (finish == "tool_calls") == bool(calls)
