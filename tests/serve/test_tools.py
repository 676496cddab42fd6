"""Calls of functions through the official client: streamed or not, demanded or free, and the prompt."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.harmony import Call, Function, Turn, any_call_header, call_header, render
from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL, TODAY
from tests.serve.strategies import CALLS, THINKS

USER = [{"role": "user", "content": "Weather in Oslo?"}]
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
FUNCTIONS = [Function("get_weather", "Weather.", PARAMETERS), Function("now", "", None)]


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
    # The second is not lost without a word.
    hidden = None if parallel is None else 'The model called get_weather, one call more than allowed: {"place": "Oslo"}'
    assert choice["message"].get("hidden") == hidden


SEARCH = "<|channel|>commentary to=browser.search code<|message|>Oslo<|call|>"
SEARCHED = "The model called browser.search, which was not offered: Oslo"


@pytest.mark.parametrize(
    ("output", "content", "calls", "hidden"),
    [
        (SEARCH, SEARCHED, 0, None),
        ("<|start|>user<|message|>Hi", "The model wrote a message of user: Hi", 0, None),
        (f"<|channel|>final<|message|>Cold.<|end|>{SEARCH}", "Cold.", 0, SEARCHED),
        (f"{SEARCH.removesuffix('<|call|>')}<|end|><|channel|>final<|message|>Cold.", "Cold.", 0, SEARCHED),
        (f"{SEARCH.removesuffix('<|call|>')}<|end|>{CALLS}", None, 1, SEARCHED),
    ],
)
@pytest.mark.parametrize("step", [1, 100])
def test_a_reply_names_what_is_hidden(serve, harmony, output, content, calls, hidden, step):
    engine = FakeEngine(harmony(THINKS + output))
    engine.step = step
    live = serve(engine)
    message = live.chat(messages=USER, tools=TOOLS).json()["choices"][0]["message"]
    assert (message["content"], message.get("hidden")) == (content, hidden)
    assert len(message.get("tool_calls", [])) == calls
    assert message["reasoning"] == "Look it up."
    streamed = streamed_message(live.chat(messages=USER, tools=TOOLS, stream=True).text)
    assert (streamed["content"] or None, streamed["hidden"] or None) == (content, hidden)


def streamed_message(text: str) -> dict[str, Any]:
    """The message that a stream's deltas add up to, its finish_reason too."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "hidden": "", "calls": [], "finish_reason": None}
    for line in text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        for name in ("content", "reasoning", "hidden"):
            message[name] += choice["delta"].get(name) or ""
        message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
        for call in choice["delta"].get("tool_calls", []):
            if call["index"] == len(message["calls"]):
                assert call["id"]
                message["calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


CALL_FORMS = st.sampled_from(
    [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
        " to=functions.get_weather<|channel|>commentary json<|message|>",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json",
        "<|channel|>commentary to=get_weather()<|message|>",
        "<|channel|>analysis to=functions.get_weather",
    ]
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    thought=st.sampled_from(["", "So.", "Two {lines}\n"]),
    preamble=st.sampled_from(["", "I shall look."]),
    call=st.none() | CALL_FORMS,
    final=st.sampled_from(["", "Cold.", '{"x": 1}']),
    most=st.none() | st.integers(1, 30),
)
def test_what_the_server_hands_out_it_takes_back(serve, harmony, tokenizer, thought, preamble, call, final, most):
    """An answer sent back as history is accepted, and is the prompt that the model wrote itself, in canonical form."""
    output = [f"<|channel|>analysis<|message|>{thought}<|end|>"] if thought else []
    output += [f"<|channel|>commentary<|message|>{preamble}<|end|>"] if preamble and call else []
    output += [f'{call}{{"place": "Oslo"}}<|call|>'] if call else []
    output += [f"<|channel|>final<|message|>{final}<|return|>"] if final and not call else []
    live = serve(FakeEngine(harmony("<|start|>assistant".join(output) or "<|return|>")))
    message = live.chat(messages=USER, tools=TOOLS, max_tokens=most).json()["choices"][0]["message"]
    answers = [
        {"role": "tool", "tool_call_id": made["id"], "content": "-5"} for made in message.get("tool_calls") or []
    ]
    again = live.chat(messages=[*USER, message, *answers], tools=TOOLS)
    assert again.status_code == 200
    if most is None:
        prompt = tokenizer.decode(live.engine.submitted[1][0], skip_special=False)
        written = (
            [f"<|start|>assistant<|channel|>analysis<|message|>{thought}<|end|>"]
            if thought and not (final and not call)
            else []
        )
        written += [f"<|start|>assistant<|channel|>commentary<|message|>{preamble}<|end|>"] if preamble and call else []
        written += (
            [
                f"<|start|>assistant{CALLS}"
                "<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-5<|end|>"
            ]
            if call
            else []
        )
        written += [f"<|start|>assistant<|channel|>final<|message|>{final}<|end|>"] if final and not call else []
        assert prompt.endswith("Weather in Oslo?<|end|>" + "".join(written) + "<|start|>assistant")


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
            " json",
            " code",
            "get_weather",
            "()",
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
def test_whatever_the_model_says_deltas_add_up_to_the_message(serve, harmony, tokenizer, pieces, step):
    tokens = [token for piece in pieces for token in harmony(piece)] + [200012]
    engine = FakeEngine(tokens)
    engine.step = step
    live = serve(engine)
    whole = live.chat(messages=USER, tools=TOOLS).json()["choices"][0]
    streamed, message = streamed_message(live.chat(messages=USER, tools=TOOLS, stream=True).text), whole["message"]
    for name in ("content", "reasoning", "hidden"):
        assert (streamed[name] or None) == message.get(name)
    calls, finish = streamed["calls"], whole["finish_reason"]
    assert streamed["finish_reason"] == finish
    assert calls == [call["function"] for call in message.get("tool_calls", [])]
    assert {call["name"] for call in calls} <= {"get_weather", "now"}
    assert (finish == "tool_calls") == bool(calls)
    # A brace stands in no header: whatever the model wrote in braces is in the reply.
    reply = json.dumps([message["content"], message["reasoning"], message.get("hidden"), *calls])
    assert reply.count("{}") == tokenizer.decode(tokens, skip_special=True).count("{}")
