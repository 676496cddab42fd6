"""Structured outputs at all endpoints: random logits write what was demanded, in harmony's forms, streamed or not."""

import itertools
import json
from typing import Any

import anthropic
import jsonschema
import pytest
from pydantic import BaseModel

import serve.compiler
from engine.grammar import Constraint
from graphs.plan import SamplingParams
from serve.grammar import Offer, answer_grammar, demanded_grammar, json_form, regex_form
from tests.fakes import FakeEngine
from tests.grammars import Walker
from tests.serve.conftest import MODEL, parse

USER = [{"role": "user", "content": "The capital of France?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"capital": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
    "required": ["capital", "people"],
    "additionalProperties": False,
}
OTHER: dict[str, Any] = {"properties": {"kind": {"enum": ["a", 'b"c', "ü"]}}, "required": ["kind"]}
PARAMETERS = {"get": SCHEMA, "get_weather": OTHER, "now": {}}
TOOLS = [
    {"type": "function", "function": {"name": "get", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "get_weather", "parameters": OTHER}},
    {"type": "function", "function": {"name": "now"}},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def walker():
    return Walker()


@pytest.fixture
def live(serve, walker):
    """A server whose model has random logits, seeded by the request."""
    return serve(FakeEngine(lambda _, sampling: walker.answer(sampling.grammar, sampling.seed, 40)))


def valid(text: str, schema: dict[str, Any] = SCHEMA) -> None:
    jsonschema.validate(json.loads(text), schema)


def check_call(name: str, arguments: str) -> None:
    assert isinstance(json.loads(arguments), dict)
    valid(arguments, PARAMETERS[name])


@pytest.mark.parametrize("seed", range(6))
def test_a_chats_content_is_the_schemas_and_its_reasoning_is_free(live, seed):
    body = {"messages": USER, "seed": seed, "response_format": FORMAT}
    reply = live.http.post("/v1/chat/completions", json=body).json()
    message = reply["choices"][0]["message"]
    assert reply["choices"][0]["finish_reason"] == "stop"
    valid(message["content"])
    assert "<|" not in message["content"]
    assert "hidden" not in message
    streamed = live.http.post("/v1/chat/completions", json={**body, "stream": True}).text
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in streamed.splitlines() if line[:7] == "data: {"]
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == (message["reasoning"] or "")


def test_every_choice_is_of_the_form_with_log_probabilities_and_stop_strings(live):
    body = {"messages": USER, "seed": 1, "response_format": FORMAT, "n": 4, "logprobs": True, "top_logprobs": 1}
    choices = live.http.post("/v1/chat/completions", json=body).json()["choices"]
    for choice in choices:
        valid(choice["message"]["content"])
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"] if "bytes:" not in entry["token"])
    assert len({choice["message"]["content"] for choice in choices}) == 4
    stopped = live.http.post("/v1/chat/completions", json=body | {"stop": '"people"'}).json()["choices"]
    for choice, before in zip(stopped, choices, strict=True):
        assert choice["message"]["content"] == before["message"]["content"].split('"people"')[0]


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({"response_format": FORMAT}, valid),
        ({"response_format": {"type": "json_object"}}, lambda text: valid(text, {"type": "object"})),
        ({"guided_json": SCHEMA}, valid),
        ({"guided_json": json.dumps(SCHEMA)}, valid),
        ({"guided_choice": ["Paris", "Rome"]}, lambda text: ["Paris", "Rome"].index(text)),
        ({"guided_regex": "[A-C]{3}"}, lambda text: jsonschema.validate(text, {"pattern": "^[A-C]{3}$"})),
        ({"guided_grammar": 'start: "a" | "b"'}, lambda text: ["a", "b"].index(text)),
        ({"structured_outputs": {"json": SCHEMA}}, valid),
        ({"structured_outputs": {"json_object": True}}, lambda text: valid(text, {"type": "object"})),
        ({"structured_outputs": {"choice": ["Paris"]}}, lambda text: ["Paris"].index(text)),
        ({"structured_outputs": {"regex": "a{7}"}}, lambda text: ["a" * 7].index(text)),
        ({"structured_outputs": {"grammar": 'root ::= "x" | "y"'}}, lambda text: ["x", "y"].index(text)),
    ],
)
def test_all_names_of_a_form_at_chat_and_at_completions(live, fields, holds):
    for seed in range(2):
        chat = live.chat(seed=seed, **fields)
        assert "x-ignored-parameters" not in chat.headers
        holds(chat.json()["choices"][0]["message"]["content"])
        completion = live.complete(seed=seed, max_tokens=900, **fields)
        holds(completion.json()["choices"][0]["text"])


@pytest.mark.parametrize("seed", range(6))
def test_strict_tools_leave_the_answer_free_and_hold_calls_to_their_schemas(live, seed):
    choice = live.chat(seed=seed, tools=TOOLS).json()["choices"][0]
    for call in choice["message"].get("tool_calls") or []:
        check_call(call["function"]["name"], call["function"]["arguments"])
    assert choice["finish_reason"] == ("tool_calls" if "tool_calls" in choice["message"] else "stop")
    assert "hidden" not in choice["message"]


def test_tools_that_are_not_strict_are_as_free_as_ever(serve):
    live = serve(FakeEngine([200002]))
    live.chat(tools=TOOLS[1:])
    live.chat(tools=TOOLS, tool_choice="none")
    assert [sampling.grammar for _, sampling in live.engine.submitted] == ["", ""]


def test_a_form_and_tools_end_in_one_of_them(live):
    ends: set[str] = set()
    for seed in itertools.count():  # most random tokens begin a call
        choice = live.chat(seed=seed, tools=TOOLS[1:], response_format=FORMAT).json()["choices"][0]
        ends.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            valid(choice["message"]["content"])
        else:
            assert choice["message"]["content"] is None
        if ends == {"stop", "tool_calls"}:
            break
        assert seed < 200


@pytest.mark.parametrize("choice", ["required", "get_weather", "get", "now"])
def test_a_demanded_call_is_made_and_its_arguments_are_valid(live, choice):
    names = set()
    wanted = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    for seed in range(6):
        answer = live.chat(seed=seed, tools=TOOLS, tool_choice=wanted).json()["choices"][0]
        assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
        (call,) = answer["message"]["tool_calls"]
        check_call(call["function"]["name"], call["function"]["arguments"])
        names.add(call["function"]["name"])
    assert names == {choice} or (choice == "required" and len(names) > 1)


def test_responses_hold_text_and_calls_to_their_schemas(live, walker):
    text_format = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    for seed in range(3):
        live.engine._script = lambda _, sampling, seed=seed: walker.answer(sampling.grammar, seed, 40)
        body = {"input": "The capital?", "text": {"format": text_format}}
        reply = live.http.post("/v1/responses", json=body).json()
        assert reply["text"]["format"] == text_format
        *_, message = reply["output"]
        valid(message["content"][0]["text"])
        streamed = live.http.post("/v1/responses", json={**body, "stream": True}).text
        *_, last = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
        assert last["response"]["output"][-1]["content"] == message["content"]
        body = {"input": "?", "tools": tools, "tool_choice": "required"}
        *_, call = live.http.post("/v1/responses", json=body).json()["output"]
        check_call(call["name"], call["arguments"])


def test_messages_hold_text_and_calls_to_their_schemas(live, walker):
    tools = [
        {"name": name, "input_schema": {"type": "object"} | schema, "strict": True}
        for name, schema in PARAMETERS.items()
    ]
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{live.port}", api_key="none", max_retries=0)
    for seed in range(3):
        live.engine._script = lambda _, sampling, seed=seed: walker.answer(sampling.grammar, seed, 40)
        message = client.messages.create(
            model=MODEL, max_tokens=900, messages=USER, tools=tools, tool_choice={"type": "any"}
        )
        (block,) = message.content
        assert (message.stop_reason, block.type) == ("tool_use", "tool_use")
        jsonschema.validate(block.input, PARAMETERS[block.name])
        body = {
            "messages": USER,
            "max_tokens": 900,
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        }
        *_, text = live.http.post("/v1/messages", json=body).json()["content"]
        valid(text["text"])


def test_the_official_clients_parse_answers(live):
    class Answer(BaseModel):
        capital: str
        people: int | None

    client = live.openai()
    chat = client.chat.completions.parse(model=MODEL, messages=USER, response_format=Answer, seed=3)
    assert isinstance(chat.choices[0].message.parsed, Answer)
    answer = client.responses.parse(model=MODEL, input="The capital?", text_format=Answer)
    assert isinstance(answer.output_parsed, Answer)


def test_an_answer_that_was_cut_is_the_beginning_of_a_whole_one(live):
    whole = live.chat(seed=5, response_format=FORMAT).json()["choices"][0]["message"]["content"]
    for most in (5, 20, 30, 45):
        choice = live.chat(seed=5, response_format=FORMAT, max_tokens=most).json()["choices"][0]
        assert whole.startswith(choice["message"]["content"] or "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "text"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"guided_json": {"properties": {"a": {"items": {"anyOf": [{}, {"type": "array", "uniqueItems": True}]}}}}},
            "guided_json.properties.a.items.anyOf[1]",
        ),
        ({"guided_json": {"$ref": "#/$defs/none"}}, "guided_json"),
        ({"guided_json": {"type": "string", "pattern": "(?=a)b"}}, "guided_json"),
        ({"guided_json": {"minLength": 5, "maxLength": 3, "type": "string"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "[a&&b]"}, "guided_regex"),
        ({"guided_grammar": 'start: start "a"'}, "guided_grammar"),
        ({"guided_json": {"anyOf": [{"$ref": "#"}]}}, "guided_json.anyOf[0]"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": 'start: "a" <|end|>'}, "guided_grammar"),
        ({"guided_grammar": 'start: "a" <[200007]>'}, "guided_grammar"),
        ({"guided_grammar": '%llguidance {"allow_invalid_utf8": true}\nstart: "a"'}, "guided_grammar"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
        ({"guided_grammar": 'root ::= "a" | b'}, "guided_grammar"),
        ({"guided_grammar": "root ::= " + '"a" ' * 2100}, "guided_grammar"),
        ({"guided_json": {"const": "x" * 600_000}}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_what_cannot_be_held_to_is_refused_with_its_place(live, fields, param):
    for response in (live.chat(**fields), live.complete(**fields)):
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert param.rpartition(".")[2] in error["message"]
    assert live.engine.submitted == []


def test_a_strict_tools_schema_is_refused_with_its_place_and_a_loose_ones_is_held_to_as_far_as_it_can_be(live):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    error = live.chat(tools=[tool]).json()["error"]
    assert error["param"] == "tools[0].function.parameters.properties.a"
    tool["function"]["strict"] = False
    assert live.chat(tools=[tool], tool_choice="required", seed=1).status_code == 200


def test_a_model_without_the_whole_vocabulary_refuses_forms(serve):
    live = serve(FakeEngine([], vocab_size=1000))
    error = live.complete(prompt=[1], guided_regex="a").json()["error"]
    assert (error["param"], error["code"]) == ("guided_regex", "unsupported_parameter")


def test_a_compilation_that_takes_too_long_is_ended_and_the_next_one_works(live, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(serve.compiler, "COMPILE_SECONDS", 0.001)
        error = live.chat(guided_regex="a").json()["error"]
        assert error["param"] == "guided_regex"
        assert "cannot be compiled within" in error["message"]
    assert live.chat(guided_regex="a").status_code == 200


# The grammar itself ---------------------------------------------------------------------------------------------------

THINKS = '<|channel|>analysis<|message|>a <b>\n{"c"<|end|><|start|>assistant'
OFFERS = [Offer(name, schema, True, "") for name, schema in PARAMETERS.items()]


def allows(walker, harmony, grammar, text) -> bool:
    """Whether an answer may be this text of harmony; it must end where the text does."""
    constraint = Constraint(walker.compiler.compile(grammar.text), SamplingParams(max_tokens=1, seed=0))
    for token in harmony(text):
        if token not in walker.allowed(constraint):
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("before", ["", THINKS, THINKS * 2])
@pytest.mark.parametrize(
    "message",
    [
        '<|channel|>final<|message|>{"capital": "Paris", "people": 2}<|return|>',
        '<|channel|>final <|constrain|>json<|message|>{"capital":"Paris","people":2}<|return|>',
        '<|channel|>final json<|message|>{"capital": "Paris", "people": 2}<|return|>',
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"kind":"a"}<|call|>',
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"kind": "a"}<|call|>',
        ' to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{"kind":"a"}<|call|>',
        "<|channel|>commentary to=functions.now<|message|>{}<|call|>",
    ],
)
def test_the_forms_that_the_model_writes_are_allowed_and_the_reader_reads_them(
    walker, harmony, tokenizer, before, message
):
    grammar = answer_grammar(json_form(SCHEMA, ""), OFFERS)
    assert allows(walker, harmony, grammar, before + message)
    *_, (segment, text) = parse(harmony(before + message), tokenizer, PARAMETERS)
    assert segment.kind in ("content", "call")
    assert text == message.partition("<|message|>")[2].rpartition("<|")[0]


@pytest.mark.parametrize(
    "message",
    [
        "<|channel|>final<|message|>Paris<|return|>",
        '<|channel|>final<|message|>{"capital": "Paris"}<|return|>',
        '<|channel|>final<|message|>{"capital": "Paris", "people": 2}<|end|>',
        '<|channel|>final<|message|>{"capital": "Paris", "people": 2}<|start|>',
        "<|channel|>final<|message|><|return|>",
        "<|channel|>analysis<|message|>So.<|return|>",
        "<|channel|>commentary<|message|>I look.<|end|>",  # it would stand before the content
        "<|channel|>commentary to=functions.other<|message|>{}<|call|>",
        "<|channel|>commentary to=python code<|message|>1<|call|>",
        '<|channel|>commentary to=functions.get_weather<|message|>{"kind":"z"}<|call|>',
        "<|end|>",
        "<|return|>",
    ],
)
def test_other_messages_are_not(walker, harmony, message):
    grammar = answer_grammar(json_form(SCHEMA, ""), OFFERS)
    assert not allows(walker, harmony, grammar, message)


def test_text_before_a_call_is_allowed_where_the_answer_is_free(walker, harmony):
    message = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>So.<|return|>"
    assert allows(walker, harmony, answer_grammar(None, OFFERS), message)


def test_a_final_answer_that_is_no_json_has_no_content_type(walker, harmony):
    grammar = answer_grammar(regex_form("[a-z]+", ""), [])
    assert allows(walker, harmony, grammar, THINKS + "<|channel|>final<|message|>paris<|return|>")
    assert not allows(walker, harmony, grammar, "<|channel|>final json<|message|>")


def test_a_demanded_call_goes_on_from_its_header(walker, harmony):
    assert allows(walker, harmony, demanded_grammar(OFFERS[1:2]), '{"kind": "a"}<|call|>')
    assert allows(
        walker, harmony, demanded_grammar(OFFERS), '.get_weather <|constrain|>json<|message|>{"kind": "a"}<|call|>'
    )
    assert not allows(walker, harmony, demanded_grammar(OFFERS), ".other")
