"""Random and mutated token streams and request bodies through the application, the engine faked: `make fuzz`.

For every case: no answer of 5xx, no answer that takes long, nothing logged, headers and errors well formed; what is
streamed adds up to what is answered whole, however the tokens arrive. A case depends on the seed and its number alone:
`python -m tests.serve.fuzz --kind stream --first 4711 --cases 1` runs one again. `test_fuzz.py` runs the first few.
"""

import argparse
import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI

from conf.schema import ServerConfig
from engine.tokenizer import Tokenizer
from serve.anthropic import INVALID_JSON, CountRequest, MessagesRequest
from serve.app import create_app
from serve.parsing import ACCEPTED, LEGACY, NEUTRAL, WISHES
from serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serve.responses import ResponsesRequest
from serve.workers import Workers
from tests.fakes import FakeEngine

SECONDS = 10  # that one answer may take
CONTEXT = 4096
MOST_BYTES = 200_000  # of a body: a mutated one may grow without end


# --- routes ---


@dataclass(frozen=True)
class Route:
    """A route that takes a body. `whole` and `streamed` make of an answer what has to be equal; without `streamed` it
    has no stream. `bodies` are valid."""

    path: str
    request: type[msgspec.Struct]
    bodies: list[dict[str, Any]]
    whole: Callable[[dict[str, Any]], object] = lambda reply: None
    streamed: Callable[[str], object] | None = None


def data(text: str) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events."""
    for event in text.split("\n\n"):
        line = event.rpartition("\n")[2]
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def openai_stream(text: str, add: Callable[[dict[str, Any], dict[str, Any]], None]) -> object:
    """Choices by index and the usage; `add(choice so far, event's choice)`."""
    assert text.endswith("data: [DONE]\n\n"), "the stream is not complete"
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in data(text):
        assert "error" not in event, event
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            so_far = choices.setdefault(choice["index"], {"finish_reason": None, "token_ids": [], "logprobs": None})
            assert so_far["finish_reason"] is None, "an event after the last one"
            so_far["finish_reason"] = choice["finish_reason"]
            so_far["token_ids"] += choice.get("token_ids", [])
            add(so_far, choice)
    return [choices[index] for index in sorted(choices)], usage


def completion(reply: dict[str, Any]) -> object:
    kept = ("finish_reason", "logprobs", "text")
    choices = [{name: c[name] for name in kept} | {"token_ids": c.get("token_ids", [])} for c in reply["choices"]]
    return choices, reply["usage"]


def add_text(so_far: dict[str, Any], choice: dict[str, Any]) -> None:
    so_far["text"] = so_far.get("text", "") + choice["text"]
    if choice["logprobs"]:
        old = so_far["logprobs"] or {name: [] for name in choice["logprobs"]}
        so_far["logprobs"] = {name: old[name] + entries for name, entries in choice["logprobs"].items()}


def chat(reply: dict[str, Any]) -> object:
    choices = []
    for choice in reply["choices"]:
        message = choice["message"]
        choices.append(
            {
                "finish_reason": choice["finish_reason"],
                "token_ids": choice.get("token_ids", []),
                "logprobs": choice["logprobs"],
                **{name: message.get(name) or "" for name in ("content", "reasoning", "reasoning_content", "hidden")},
                "calls": [call["function"] for call in message.get("tool_calls", [])],
            }
        )
    return choices, reply["usage"]


def add_delta(so_far: dict[str, Any], choice: dict[str, Any]) -> None:
    delta = choice["delta"]
    for name in ("content", "reasoning", "reasoning_content", "hidden"):
        so_far[name] = so_far.get(name, "") + (delta.get(name) or "")
    if choice["logprobs"]:
        so_far["logprobs"] = {
            "content": (so_far["logprobs"] or {"content": []})["content"] + choice["logprobs"]["content"]
        }
    calls = so_far.setdefault("calls", [])
    for call in delta.get("tool_calls", []):
        if call["index"] == len(calls):
            assert call["id"], "a call begins without an id"
            calls.append({"name": call["function"]["name"], "arguments": ""})
        calls[call["index"]]["arguments"] += call["function"]["arguments"]


def message(reply: dict[str, Any]) -> object:
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in reply["content"]]
    return blocks, reply["stop_reason"], reply["stop_sequence"], reply["usage"]


def streamed_message(text: str) -> object:
    first, *events = data(text)
    assert first["type"] == "message_start", first
    assert events.pop()["type"] == "message_stop", "the stream is not complete"
    last = events.pop()
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        match event["type"]:
            case "ping":
                continue
            case "content_block_start":
                assert not is_open
                is_open = True
                blocks.append({name: value for name, value in event["content_block"].items() if name != "id"})
                blocks[-1]["input"] = ""
            case "content_block_delta":
                for name, value in event["delta"].items():
                    name = {"partial_json": "input"}.get(name, name)
                    if name != "type":
                        blocks[-1][name] += value
            case "content_block_stop":
                assert is_open
                is_open = False
            case other:
                raise AssertionError(f"an event of the type {other}")
        assert event["index"] == len(blocks) - 1
    assert not is_open
    for block in blocks:
        arguments = block.pop("input")
        if block["type"] == "tool_use":
            try:
                msgspec.json.decode(arguments or "{}", type=dict)
                block["input"] = json.loads(arguments or "{}")
            except (msgspec.MsgspecError, RecursionError):
                block["input"] = {INVALID_JSON: arguments}
    return blocks, last["delta"]["stop_reason"], last["delta"]["stop_sequence"], last["usage"]


def response(reply: dict[str, Any]) -> object:
    items = [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in reply["output"]]
    return items, reply["status"], reply["incomplete_details"], reply["usage"]


def streamed_response(text: str) -> object:
    """What the last event holds, once the events before it are found to say the same."""
    *events, last = data(text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert last["type"] in ("response.completed", "response.incomplete"), "the stream is not complete"
    assert [event["sequence_number"] for event in [*events, last]] == list(range(len(events) + 1))
    items, texts = [], {}
    for event in events[2:]:
        if event["type"] == "response.output_item.done":
            items.append(event["item"])
            assert event["output_index"] == len(items) - 1
            item = event["item"]
            told = item.get("arguments", item.get("input"))
            told = item["content"][0]["text"] if told is None else told
            assert texts.pop(item["id"], "") == told, item
        elif event["type"].endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    assert not texts
    assert items == last["response"]["output"]
    return response(last["response"])


USER = [{"role": "user", "content": "Weather in Oslo?"}]
PLACE = {
    "$defs": {"City": {"anyOf": [{"enum": ["Oslo", "Rome"]}, {"type": "null"}]}},
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "description": "How many."}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "-5"}]},
]
BLOCKS = [
    *USER,
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Look.", "signature": "s"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Oslo"}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "-5", "is_error": False}]},
]
ANTHROPIC_TOOLS = [{"name": "get_weather", "input_schema": PLACE}, {"name": "now", "input_schema": {"type": "object"}}]
RESPONSES_TOOLS = [
    {"type": "function", "name": "get_weather", "description": "Weather.", "parameters": PLACE, "strict": True},
    {"type": "custom", "name": "note", "format": {"type": "text"}},
    {"type": "namespace", "name": "functions", "description": "More.", "tools": [{"type": "function", "name": "now"}]},
    {"type": "web_search"},
]
ITEMS = [
    *USER,
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "-5"},
    {"type": "custom_tool_call", "call_id": "c2", "name": "note", "input": "cold"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "kept"}]},
]

COMPLETIONS = Route(
    "/v1/completions",
    CompletionRequest,
    [
        {"prompt": "Hello", "max_tokens": 500},
        {"prompt": ["Hello", "you"], "n": 2, "max_tokens": 500, "logprobs": 2, "stop": ["x", "json"], "echo": False},
        {"prompt": [[1, 2], [3]], "max_tokens": 9, "ignore_eos": True, "return_token_ids": True, "echo": True},
        {"prompt": [5, 6], "max_tokens": 500, "skip_special_tokens": False, "ignore_eos": True, "min_tokens": 3},
        {"prompt": "a", "logit_bias": {"5": 1.5}, "seed": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5},
        {"prompt": "a", "structured_outputs": {"regex": "[a-z]+"}, "response_format": {"type": "text"}},
    ],
    completion,
    lambda text: openai_stream(text, add_text),
)
CHAT = Route(
    "/v1/chat/completions",
    ChatRequest,
    [
        {"messages": USER},
        {"messages": USER, "tools": TOOLS, "ignore_eos": True},
        {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": PLACE}}},
        {"messages": USER, "tools": TOOLS, "ignore_eos": True, "parallel_tool_calls": False, "n": 2},
        {"messages": HISTORY, "tools": TOOLS, "logprobs": True, "top_logprobs": 2, "ignore_eos": True, "stop": "te"},
        {"messages": HISTORY, "tools": TOOLS, "tool_choice": "required", "return_token_ids": True},
        {"messages": USER, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}},
        {"messages": USER, "reasoning_effort": "high", "include_reasoning": False, "ignore_eos": True, "min_tokens": 5},
        {"messages": [*USER, {"role": "assistant", "content": "In "}], "continue_final_message": True},
        {"messages": USER, "max_completion_tokens": 9, "ignore_eos": True, "return_tokens_as_token_ids": True},
    ],
    chat,
    lambda text: openai_stream(text, add_delta),
)
MESSAGES = Route(
    "/v1/messages",
    MessagesRequest,
    [
        {"messages": USER, "max_tokens": 500},
        {"messages": BLOCKS, "max_tokens": 500, "tools": ANTHROPIC_TOOLS, "stop_sequences": ["te", "json"]},
        {"messages": USER, "max_tokens": 500, "tools": ANTHROPIC_TOOLS, "thinking": {"type": "enabled"}},
        {"messages": USER, "max_tokens": 9, "tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "any"}},
        {"messages": USER, "max_tokens": 500, "tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "now"}},
        {"messages": USER, "max_tokens": 500, "thinking": {"type": "adaptive", "display": "omitted"}},
        {"messages": [*USER, {"role": "assistant", "content": "In "}], "max_tokens": 500, "system": "Be brief."},
    ],
    message,
    streamed_message,
)
RESPONSES = Route(
    "/v1/responses",
    ResponsesRequest,
    [
        {"input": "Hello", "max_output_tokens": 500},
        {"input": USER, "tools": RESPONSES_TOOLS, "include": ["reasoning.encrypted_content"], "store": False},
        {"input": ITEMS, "tools": RESPONSES_TOOLS, "parallel_tool_calls": False, "instructions": "Be brief."},
        {"input": ITEMS, "tools": RESPONSES_TOOLS, "tool_choice": "required", "metadata": {"a": "b"}},
        {"input": USER, "tools": RESPONSES_TOOLS, "tool_choice": {"type": "custom", "name": "note"}},
        {"input": USER, "top_logprobs": 2, "include": ["message.output_text.logprobs"], "max_output_tokens": 9},
        {"input": USER, "reasoning": {"effort": "high", "summary": "auto"}, "text": {"format": {"type": "text"}}},
    ],
    response,
    streamed_response,
)
GENERATING = (COMPLETIONS, CHAT, MESSAGES, RESPONSES)  # a new endpoint joins here
ROUTES = (
    *GENERATING,
    Route("/v1/messages/count_tokens", CountRequest, [{"messages": BLOCKS, "tools": ANTHROPIC_TOOLS}]),
    Route("/v1/responses/input_tokens", ResponsesRequest, RESPONSES.bodies),
    Route("/tokenize", TokenizeRequest, [{"prompt": "Hello"}, {"messages": HISTORY, "tools": TOOLS}]),
    Route("/detokenize", DetokenizeRequest, [{"tokens": [1, 2, 200002]}]),
)


# --- cases ---

HEADS = (
    "<|channel|>analysis<|message|>",
    "<|channel|>final<|message|>",
    "<|channel|>commentary<|message|>",
    "<|channel|>final <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
    " to=functions.get_weather<|channel|>commentary json<|message|>",
    "<|channel|>commentary to=get_weather()",
    "<|channel|>commentary to=python code<|message|>",
    "<|channel|>analysis to=functions.now",
    ".get_weather <|constrain|>json<|message|>",
)
TEXTS = (
    "think",
    "Cold, -5.",
    '{"city": "Oslo"}',
    "{}",
    "",
    " json{",
    "\U0001f9d1\u200d\U0001f680 caf\u00e9",
    "te\nxt " * 9,
)
ENDS = ("<|end|><|start|>assistant", "<|end|>", "<|call|>", "<|return|>", "", "<|end|><|start|>user")
PIECES = (
    *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>", "<|return|>"),
    *("assistant", "user", "functions.now", "commentary", "analysis", "final", " to=", " to=functions.get_weather"),
    *(" to=python", " json", " code", "get_weather", "()", "{", "}", '"a": 1', "text", "\U0001f9d1", " ", "\n"),
)


def tokens(draw: random.Random, encode: Callable[[str], list[int]]) -> list[int]:
    """What a model may write: answers in all forms, mutated; pieces of headers; any tokens."""
    kind = draw.random()
    if kind < 0.6:
        messages = [draw.choice(HEADS) + draw.choice(TEXTS) + draw.choice(ENDS) for _ in range(draw.randint(1, 4))]
        ids = encode("".join(messages))
        for _ in range(draw.choice((0, 1, 1, 2, 5))):
            at, other = draw.randrange(len(ids) + 1), draw.randrange(len(ids) + 1)
            match draw.randrange(5):
                case 0:
                    del ids[at : at + draw.randint(1, 4)]
                case 1:
                    ids[at:at] = ids[other : other + 5]
                case 2:
                    ids[at:at] = [any_token(draw)]
                case 3:
                    ids[at : at + 1] = encode(draw.choice(PIECES))
                case 4:
                    del ids[at:]
    elif kind < 0.9:
        ids = [token for _ in range(draw.randint(1, 20)) for token in encode(draw.choice(PIECES))]
    else:
        ids = [any_token(draw) for _ in range(draw.randint(1, 30))]
    return ids or [any_token(draw)]


def any_token(draw: random.Random) -> int:
    """Any token; often a single byte or a control token."""
    return draw.choice((draw.randrange(256), draw.randrange(199998, 200019), draw.randrange(201088)))


JUNK: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1.5, 4.0, 1e308),
    *(
        "",
        "x",
        "auto",
        "none",
        "function",
        "text",
        "a" * 300,
        "\ud800",
        "\x00\n",
        "\u2028<|end|><|start|>",
        "get_weather",
    ),
    *([], {}, [[]], [None], {"": None}, [1, "a"], [[1], "a"], {"type": "text"}, {"type": "function"}, {"type": []}),
    *(
        {"$ref": "#"},
        {"$ref": "#/$defs/x"},
        {"anyOf": [{"$ref": "#/$defs/City"}]},
        {"allOf": [{"$ref": "#"}]},
        {"type": "object", "properties": {"a": True}},
    ),
    *({"effort": "low"}, {"role": "user", "content": "x"}, [{"role": "assistant", "content": None}]),
)


def body(draw: random.Random, route: Route) -> bytes:
    """A valid body, one that is mutated in some places, or bytes that are no JSON."""
    value: Any = json.loads(json.dumps(draw.choice(route.bodies)))
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        value = mutated(draw, route, value)
    encoded = json.dumps(value).encode()[:MOST_BYTES]
    if draw.random() < 0.05:
        at = draw.randrange(len(encoded) + 1)
        junk = draw.choice(
            (b"", b"\xff", b"\xef\xbb\xbf", b"[" * 5000, b"NaN", b"1e999", b"\x00", b'"', b"}", b"9" * 400)
        )
        encoded = draw.choice((encoded[:at] + junk, encoded[:at] + junk + encoded[at:], junk + encoded, junk))
    return encoded


def mutated(draw: random.Random, route: Route, value: Any) -> Any:
    """The value with one change somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.75:
        key = draw.choice(list(value))
        return value | {key: mutated(draw, route, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.75:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(draw, route, value[at]), *value[at + 1 :]]
    junk = draw.choice(JUNK)
    if isinstance(value, dict) and draw.random() < 0.8:
        names = [*route.request.__struct_fields__, *NEUTRAL, *LEGACY, *WISHES, *ACCEPTED, "type", "unknown\n", "&"]
        new, lost = draw.choice(names), draw.choice([*value, ""])
        return value | {new: junk} if draw.random() < 0.6 else {k: v for k, v in value.items() if k != lost}
    if isinstance(value, list) and draw.random() < 0.8:
        return draw.choice(([*value, junk], value[1:], value * 2, value * 70))
    if draw.random() < 0.1:
        for _ in range(draw.choice((3, 100, 900))):
            junk = draw.choice(([junk], {"a": junk}))
    return junk


# --- running them ---


class LogWatch(logging.Handler):
    """Remembers what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str


async def ask(app: FastAPI, path: str, content: bytes, seconds: float = SECONDS) -> Answer:
    """The answer to a POST, as a server would send it. Raises AssertionError for what no server could send."""
    sent: list[Any] = []
    unread = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if unread:
            return unread.pop()
        return await asyncio.Event().wait()  # the client stays

    async def send(part: Any) -> None:
        sent.append(part)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "query_string": b"", "headers": []}
    start = time.monotonic()
    async with asyncio.timeout(seconds):
        await app(scope, receive, send)
    assert time.monotonic() - start < seconds, "it took too long"
    first, *parts = sent
    assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False], "it has no end"
    for name, value in first["headers"]:
        assert re.fullmatch(rb"[a-z-]+", name), name
        assert re.fullmatch(rb"[\x20-\x7e]*", value), value
    headers = {name.decode(): value.decode() for name, value in first["headers"]}
    answered = b"".join(part["body"] for part in parts)
    assert headers.get("content-length", str(len(answered))) == str(len(answered))
    return Answer(first["status"], headers, answered.decode())


def error_of(answer: Answer) -> object:
    """The error of a refusal, checked."""
    assert 400 <= answer.status < 500, f"{answer.status}: {answer.text}"
    error = json.loads(answer.text)["error"]
    assert error["message"]
    assert error["type"]
    return answer.status, error


class Fuzz:
    """The application over a faked engine, and the checks."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._engine = FakeEngine(lambda *_: self._tokens, max_context=CONTEXT)
        self._tokens: list[int] = []
        encoding = Tokenizer().encoding
        self._encode = lambda text: encoding.encode(text, allowed_special="all")
        self._app = create_app(self._engine, ServerConfig(), "fuzzed", Workers())

    async def stream_case(self, number: int) -> bool:
        """A stream of tokens through one route. True: it was answered, not refused."""
        draw = random.Random(f"{self._seed} stream {number}")
        route = draw.choice(GENERATING)
        self._tokens = tokens(draw, self._encode)
        answered = await self._both(draw, route, json.dumps(draw.choice(route.bodies)).encode())
        assert answered, "a valid request was refused"
        return answered

    async def body_case(self, number: int) -> bool:
        """A body through one route. True: it was answered, not refused."""
        draw = random.Random(f"{self._seed} body {number}")
        route = draw.choice(ROUTES)
        self._tokens = tokens(draw, self._encode)
        return await self._both(draw, route, body(draw, route))

    async def _both(self, draw: random.Random, route: Route, content: bytes) -> bool:
        """Answer a body whole and streamed, and compare."""
        if route.streamed is None:
            return await self._ask(draw, route, content) is not None
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict) or fields.get("stream") not in (None, False, True):
            answer = await self._ask(draw, route, content)
            assert answer is None, "it should have been refused"
            return False
        whole = await self._ask(draw, route, json.dumps(fields | {"stream": False}).encode())
        if route in (COMPLETIONS, CHAT) and fields.get("prompt_logprobs") is not None:
            return whole is not None  # which has no stream
        if route is not MESSAGES:
            fields.setdefault("stream_options", {"include_usage": True})
        streamed = await self._ask(draw, route, json.dumps(fields | {"stream": True}).encode())
        if whole is None or streamed is None:
            assert whole is streamed, "refused in one of two forms"
            return False
        assert whole.headers["content-type"] == "application/json"
        assert streamed.headers["content-type"].startswith("text/event-stream")
        expected, got = route.whole(json.loads(whole.text)), route.streamed(streamed.text)
        if isinstance(got, tuple) and got[-1] is None:  # no usage was asked for
            assert isinstance(expected, tuple)
            expected = (*expected[:-1], None)
        assert got == expected, f"streamed {got}\nwhole    {expected}"
        return True

    async def _ask(self, draw: random.Random, route: Route, content: bytes) -> Answer | None:
        """A checked answer; None for a refusal."""
        self._engine.step = draw.choice((1, 2, 5, 1000))
        self._engine.submitted.clear()
        self._engine.salts.clear()
        answer = await ask(self._app, route.path, content)
        assert not self._engine.running, "a request runs on"
        if answer.status == 200:
            return answer
        error_of(answer)
        return None


def run(kind: str, cases: int, seed: int = 0, first: int = 0, report: Callable[[str], None] = lambda line: None) -> int:
    """Run the cases from number `first` on; how many were answered, not refused. Raises AssertionError at the first
    that fails, naming it."""
    watch = LogWatch()

    async def all_of_them() -> int:
        fuzz = Fuzz(seed)
        case = fuzz.stream_case if kind == "stream" else fuzz.body_case
        answered, start = 0, time.monotonic()
        for number in range(first, first + cases):
            try:
                answered += await case(number)
                assert not watch.lines, watch.lines
            except (Exception, asyncio.CancelledError) as error:
                error.add_note(f"python -m tests.serve.fuzz --kind {kind} --seed {seed} --first {number} --cases 1")
                raise
            if (number - first + 1) % 5000 == 0:
                report(f"{number - first + 1} of {cases}, {answered} answered, {time.monotonic() - start:.0f} s")
        return answered

    logging.getLogger().addHandler(watch)
    try:
        return asyncio.run(all_of_them())
    finally:
        logging.getLogger().removeHandler(watch)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes the server; the engine is faked.")
    parser.add_argument("--kind", choices=("stream", "body"), help="of token streams or of bodies; default: both")
    parser.add_argument("--cases", type=int, help="default: 100,000 streams, 20,000 bodies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    given = parser.parse_args()
    for kind, default in (("stream", 100_000), ("body", 20_000)):
        if given.kind in (None, kind):
            cases = default if given.cases is None else given.cases
            answered = run(kind, cases, given.seed, given.first, report=lambda line: print(line, flush=True))
            print(f"{kind}: {cases} cases, {answered} answered, {cases - answered} refused, no failure", flush=True)


if __name__ == "__main__":
    main()
