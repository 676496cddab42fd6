"""Random forms of answers at every endpoint, written by random logits: `make fuzz-forms`.

A case is a request with a form of its own (a JSON schema, a regular expression, choices, a grammar, tools), answered
whole and streamed. What was finished is valid (jsonschema, Python's `re`); what `max_tokens` or a stop string cut can
be completed to what is valid; the messages around it are harmony to OpenAI's own strict parser. A case depends on the
seed and its number alone. With `--tp` a server in processes of its own answers, whose model has random weights.
`test_fuzz_forms.py` runs the first few.
"""

import argparse
import asyncio
import collections
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import jsonschema
from openai_harmony import Role

from conf.limits import CALL, CHANNEL, END, MESSAGE, RETURN, START
from conf.schema import ServerConfig
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.anthropic import INVALID_JSON
from serve.app import create_app
from serve.grammar import Form, choice_form, json_form, regex_form, text_grammar, user_form
from serve.workers import Workers
from tests.fakes import FakeEngine
from tests.grammars import HOSTILE, Walker, random_schema
from tests.serve.fuzz import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Answer, Route, ask, error_of
from tests.served import Served

CASES = 10_000
CONTEXT = 4096
SECONDS = 60  # that an answer may take: random logits need some
TOGETHER = 8  # requests at once to a server in processes of its own
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
USER = [{"role": "user", "content": "Say it."}]
# A model of random weights hardly ever draws what ends a text: these tokens are made likelier where a request can.
LIKELIER = {str(token): 9.0 for token in (RETURN, CALL, END, MESSAGE, CHANNEL)} | {"1": 6.0, "92": 6.0, "60": 6.0}
SHAPE = {
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SMALL = ("decode_rows=[1,8]", "prefill_tokens=[256]", "prompt_logprobs=[]", "max_context=1024", "pages=200")


# --- forms ---


class Demand(NamedTuple):
    """What an answer is to be."""

    form: Form
    check: Callable[[str], object]  # raises for a text that it is not
    fields: dict[str, Any]  # that demand it of chat and completions
    schema: dict[str, Any] | None = None  # where the answer is JSON


def demand(draw: random.Random) -> Demand:
    """A form of any kind."""
    kind = draw.choice(("schema", "schema", "schema", "object", "regex", "choice", "grammar"))
    if kind in ("schema", "object"):
        schema = random_form(draw) if kind == "schema" else {"type": "object"}
        fields = [
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
            {"guided_json": schema},
            {"guided_json": json.dumps(schema)},
            {"structured_outputs": {"json": schema}},
        ]
        if kind == "object":
            fields = [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
        return Demand(json_form(schema, ""), lambda text: valid(text, schema), draw.choice(fields), schema)
    if kind == "choice":
        pool = ["yes", "no", "a/b", "(x)|y", "\n#ü", "<|end|>", "日本", " ", '{"a": 1}', "yes no"]
        choices = draw.sample(pool, draw.randint(1, 5))
        fields = [{"guided_choice": choices}, {"structured_outputs": {"choice": choices}}]
        return Demand(choice_form(choices, ""), choices.index, draw.choice(fields))
    parts = [random_part(draw) for _ in range(draw.randint(1, 4))]
    regex = "".join(part.regex for part in parts)

    def check(text: str) -> None:
        assert re.fullmatch(regex, text), f"{text!r} is not of {regex!r}"

    if kind == "regex":
        fields = [{"guided_regex": regex}, {"structured_outputs": {"regex": regex}}]
        return Demand(regex_form(regex, ""), check, draw.choice(fields))
    grammar = draw.choice(
        ("start: " + " ".join(part.lark for part in parts), "root ::= " + " ".join(part.gbnf for part in parts))
    )
    fields = [{"guided_grammar": grammar}, {"structured_outputs": {"grammar": grammar}}]
    return Demand(user_form(grammar, ""), check, draw.choice(fields))


class Part(NamedTuple):
    """A piece of text in three notations."""

    regex: str
    lark: str
    gbnf: str


def random_part(draw: random.Random) -> Part:
    """A literal, or characters of a class."""
    if draw.random() < 0.4:
        text = draw.choice(("so ", "/", 'a"b', "é", "日本", "x-1", "the capital is "))
        return Part(re.escape(text), json.dumps(text, ensure_ascii=False), json.dumps(text, ensure_ascii=False))
    letters = draw.choice(("a-z", "0-9", "A-Ca-c", "à-ý", "0-9a-f"))
    low = draw.randint(0, 3)
    high = low + draw.randint(1, 9)
    return Part(f"[{letters}]{{{low},{high}}}", f"/[{letters}]{{{low},{high}}}/", f"[{letters}]{{{low},{high}}}")


def random_form(draw: random.Random) -> dict[str, Any]:
    """A JSON schema: a hostile one, or one of the kinds that clients send, with more to it at times."""
    if draw.random() < 0.1:
        return HOSTILE[draw.choice(list(HOSTILE))]
    schema, more = random_schema(draw), draw.random()
    if more < 0.1:
        node = {"type": "object", "properties": {"value": schema, "next": {"$ref": "#/$defs/node"}}}
        return {
            "$defs": {"node": node | {"required": ["value"], "additionalProperties": False}},
            "$ref": "#/$defs/node",
        }
    if more < 0.2:
        return {"type": "object", "patternProperties": {"^[a-z]{1,5}$": schema}, "additionalProperties": False}
    if more < 0.3:
        pattern = "^" + "".join(random_part(draw).regex.replace("\\ ", " ").replace("\\-", "-") for _ in range(3)) + "$"
        return {"type": "object", "properties": {"a": schema, "b": {"type": "string", "pattern": pattern}}}
    if more < 0.4:
        number = {"type": "number", "exclusiveMinimum": draw.randint(-9, 9), "multipleOf": draw.choice((0.5, 1, 7))}
        return {"type": "array", "prefixItems": [number], "items": schema, "minItems": 1}
    if more < 0.5:
        formats = ("date", "time", "date-time", "ipv4", "ipv6", "uuid", "email")
        return {"anyOf": [schema, {"type": "string", "format": draw.choice(formats)}]}
    return schema


def valid(text: str, schema: dict[str, Any]) -> None:
    """Raises where the text is not JSON of the schema."""
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=FORMATS)


# --- requests ---


@dataclass
class Case:
    """A request, and what its answers are to be."""

    route: Route
    body: dict[str, Any]
    text: Demand | None = None  # of the text
    calls: dict[str, Demand] = field(default_factory=dict)  # of the arguments, by function
    must_call: bool = False


class Piece(NamedTuple):
    """One part of an answer that was demanded."""

    demand: Demand
    text: str
    is_whole: bool


def random_case(draw: random.Random, real: bool) -> Case:
    """real: a real model is to answer, which has no closers to bring it to an end."""
    route = draw.choice((COMPLETIONS, CHAT, CHAT, MESSAGES, RESPONSES))
    cut = draw.random() < 0.3
    most = draw.randint(1, 60) if cut else 300 if real else 900
    if route is COMPLETIONS:
        wanted = demand(draw)
        body = {"prompt": "So: ", "max_tokens": most, **wanted.fields, **options(draw, real, 1)}
        return Case(route, body, wanted)
    text, calls, must_call = None, {}, False
    if with_tools := draw.random() < 0.5:
        names = draw.sample(["get", "get_weather", "now", "a-b.c"], draw.randint(1, 3))
        calls = {name: arguments(draw) for name in names}
        must_call = draw.random() < 0.6
    if not with_tools or (not must_call and draw.random() < 0.5):
        text = demand(draw)
        while route is not CHAT and text.schema is None:
            text = demand(draw)
    schemas = {name: wanted.schema for name, wanted in calls.items()}
    named = draw.choice([*calls]) if must_call and draw.random() < 0.5 else None
    if named:
        calls = {named: calls[named]}
    if route is CHAT:
        body = {"messages": USER, "max_tokens": most, **options(draw, real, True)}
        body |= text.fields if text else {}
        if schemas:
            functions = [{"name": name, "parameters": schema, "strict": True} for name, schema in schemas.items()]
            body["tools"] = [{"type": "function", "function": function} for function in functions]
            if must_call:
                body["tool_choice"] = {"type": "function", "function": {"name": named}} if named else "required"
    elif route is MESSAGES:
        body = {"messages": USER, "max_tokens": most, "temperature": draw.choice((0, 1))}
        if text:
            body["output_config"] = {"format": {"type": "json_schema", "schema": text.schema}}
        if schemas:
            body["tools"] = [{"name": n, "input_schema": schema, "strict": True} for n, schema in schemas.items()]
            if must_call:
                body["tool_choice"] = {"type": "tool", "name": named} if named else {"type": "any"}
        if draw.random() < 0.5:
            body["thinking"] = {"type": "enabled"}
    else:
        body = {"input": USER, "max_output_tokens": most, "temperature": draw.choice((0, 1))}
        if text:
            body["text"] = {"format": {"type": "json_schema", "name": "a", "schema": text.schema}}
        if schemas:
            body["tools"] = [
                {"type": "function", "name": name, "parameters": schema, "strict": True}
                for name, schema in schemas.items()
            ]
            if must_call:
                body["tool_choice"] = {"type": "function", "name": named} if named else "required"
    return Case(route, body, text, calls, must_call)


def arguments(draw: random.Random) -> Demand:
    """What a function takes."""
    names = draw.sample(["city", "größe", "x y", "n"], draw.randint(0, 3))
    schema = {
        "type": "object",
        "properties": {name: random_schema(draw, 2) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": False,
    }
    return Demand(json_form(schema, ""), lambda text: valid(text, schema), {}, schema)


def options(draw: random.Random, real: bool, logprobs: Any) -> dict[str, Any]:
    """Options of chat and completions."""
    fields: dict[str, Any] = {"seed": draw.randrange(2**31)}
    for name, values in (
        ("n", (2, 3)),
        ("logprobs", (logprobs,)),
        ("stop", ("q", [",", "0"])),
        ("min_tokens", (1,)),
        ("repetition_penalty", (1.3,)),
        ("frequency_penalty", (0.5,)),
        ("top_k", (40,)),
        ("temperature", (0.0, 0.7, 1.9)),
        ("return_token_ids", (True,)),
    ):
        if draw.random() < 0.15:
            fields[name] = draw.choice(values)
    if real and draw.random() < 0.8:
        fields["logit_bias"] = LIKELIER
    return fields


# --- answers ---


def pieces(case: Case, reply: dict[str, Any]) -> list[Piece]:
    """What the reply holds of what was demanded. Raises AssertionError where a whole answer lacks it."""
    found = []
    for texts, calls, is_whole in READERS[case.route.path](reply, case):
        text = "".join(texts)
        found += [Piece(case.calls[name], written, is_whole) for name, written in calls]
        assert not (calls and text and case.text), "an answer and a call"
        if case.text and not calls:
            found.append(Piece(case.text, text, is_whole))
        assert calls or not (case.must_call and is_whole), "no call"
        assert calls or text or not is_whole or not case.text or is_valid(case.text, ""), "an empty answer"
    return found


Read = list[tuple[list[str], list[tuple[str, str]], bool]]  # of each choice: its texts, its calls, whether it is whole


def read_completion(reply: dict[str, Any], case: Case) -> Read:
    stops = case.body.get("stop") is not None
    return [([c["text"]], [], c["finish_reason"] == "stop" and not stops) for c in reply["choices"]]


def read_chat(reply: dict[str, Any], case: Case) -> Read:
    read: Read = []
    for choice in reply["choices"]:
        message = choice["message"]
        assert "hidden" not in message, message
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
        is_whole = choice["finish_reason"] == "tool_calls" or (
            choice["finish_reason"] == "stop" and case.body.get("stop") is None
        )
        read.append(([message["content"] or ""], calls, is_whole))
    return read


def read_message(reply: dict[str, Any], case: Case) -> Read:
    texts = [block["text"] for block in reply["content"] if block["type"] == "text"]
    calls = [
        (block["name"], block["input"].get(INVALID_JSON) or json.dumps(block["input"], ensure_ascii=False))
        for block in reply["content"]
        if block["type"] == "tool_use"
    ]
    is_whole = reply["stop_reason"] in ("end_turn", "tool_use")
    if not is_whole and calls == [(name, "{}") for name, _ in calls]:
        calls = [(name, "") for name, _ in calls]  # nothing of its arguments came
    return [(texts, calls, is_whole)]


def read_response(reply: dict[str, Any], case: Case) -> Read:
    items = reply["output"]
    texts = [part["text"] for item in items if item["type"] == "message" for part in item["content"]]
    calls = [(item["name"], item["arguments"]) for item in items if item["type"] == "function_call"]
    return [(texts, calls, reply["status"] == "completed")]


READERS = {
    COMPLETIONS.path: read_completion,
    CHAT.path: read_chat,
    MESSAGES.path: read_message,
    RESPONSES.path: read_response,
}


def is_valid(wanted: Demand, text: str) -> bool:
    try:
        wanted.check(text)
    except (AssertionError, ValueError, jsonschema.ValidationError):
        return False
    return True


# --- running them ---


class Checks:
    """What every answer is held to."""

    def __init__(self, walker: Walker) -> None:
        self._walker, self._tokenizer = walker, Tokenizer()
        self.counts: collections.Counter[str] = collections.Counter()

    def check(self, case: Case, reply: dict[str, Any]) -> list[Piece]:
        """Raises for an answer that is not what was demanded."""
        self.counts[case.route.path] += 1
        found = pieces(case, reply)
        for wanted, text, is_whole in found:
            if is_whole:
                wanted.check(text)
            elif not is_valid(wanted, text):
                begun = text.removesuffix("\ufffd")  # a character that was cut
                wanted.check(begun + self._walker.rest(text_grammar(wanted.form).text, begun))
            self.counts["whole" if is_whole else "cut"] += 1
        return found

    def last_message(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The last message of a conversation's whole answer. Raises where OpenAI's parser cannot read it."""
        header = prompt[len(prompt) - 1 - prompt[::-1].index(START) + 2 :]  # of a demanded call, behind the role
        *_, last = self._tokenizer.encoding.parse_messages_from_completion_tokens([*header, *tokens], Role.ASSISTANT)
        self.counts["harmony"] += 1
        return str(last.content[0].text)


class Fuzz:
    """The application over a faked engine that writes by random logits."""

    def __init__(self, seed: int, walker: Walker) -> None:
        self._seed, self._walker, self.checks = seed, walker, Checks(walker)
        self._engine = FakeEngine(self._write, max_context=CONTEXT)
        self._app = create_app(self._engine, ServerConfig(), "fuzzed", Workers())
        self._written: dict[tuple[str, int], list[int]] = {}  # of the case, by grammar and seed
        self._number, self._most, self._is_seeded = 0, 0, False

    def _write(self, _: list[int], sampling: SamplingParams) -> list[int]:
        assert sampling.grammar, "it is held to nothing"
        key = sampling.grammar, sampling.seed if self._is_seeded else self._number
        if key not in self._written:
            held = {"min_tokens": sampling.min_tokens, "stop_token_ids": sampling.stop_token_ids}
            self._written[key] = self._walker.answer(*key, self._most, **held)
        return self._written[key]

    async def case(self, number: int) -> None:
        """Answer a case whole and streamed. Raises AssertionError, or ValidationError, for a fault."""
        draw = random.Random(f"{self._seed} form {number}")
        case = random_case(draw, real=False)
        self._number, self._most, self._is_seeded = number, draw.choice((5, 40, 120)), "seed" in case.body
        self._written.clear()
        answer = await self._ask(draw, case, stream=False)
        if answer.status != 200:
            error_of(answer)
            self.checks.counts["refused"] += 1
            return
        reply = json.loads(answer.text)
        found = self.checks.check(case, reply)
        for prompt, sampling in self._engine.submitted:
            tokens = self._write(prompt, sampling)
            assert len([token for token in tokens if token in (RETURN, CALL)]) <= 1, "it goes on after its end"
            if case.route is not COMPLETIONS and sampling.max_tokens >= len(tokens):
                last = self.checks.last_message(prompt, tokens)
                if found and not case.body.keys() & {"n", "stop"}:
                    assert found[-1].text == last or json.loads(found[-1].text) == json.loads(last)
        streamed = await self._ask(draw, case, stream=True)
        assert_equal(case, reply, streamed.text, usage=True)

    async def _ask(self, draw: random.Random, case: Case, stream: bool) -> Answer:
        self._engine.submitted.clear()
        self._engine.step = draw.choice((1, 2, 5, 1000))
        answer = await ask(self._app, case.route.path, json.dumps(streaming(case, stream)).encode(), SECONDS)
        assert answer.status < 500, answer.text
        return answer


def streaming(case: Case, stream: bool) -> dict[str, Any]:
    """The request, answered as a stream or whole."""
    usage = {"stream_options": {"include_usage": True}} if stream and case.route in (COMPLETIONS, CHAT) else {}
    return case.body | {"stream": stream} | usage


def assert_equal(case: Case, reply: dict[str, Any], stream: str, usage: bool) -> None:
    """The stream adds up to the reply; `usage`: to its usage too."""
    assert case.route.streamed is not None
    expected, got = case.route.whole(reply), case.route.streamed(stream)
    assert isinstance(expected, tuple)
    assert isinstance(got, tuple)
    if not usage:  # which tells what was cached
        expected, got = expected[:-1], got[:-1]
    assert got == expected, f"streamed {got}\nwhole    {expected}"


def failing(error: BaseException, seed: int, number: int, more: str = "") -> None:
    """Names the case that failed."""
    error.add_note(f"python -m tests.serve.fuzz_forms --seed {seed} --first {number} --cases 1{more}")


def run(
    cases: int, walker: Walker, seed: int = 0, first: int = 0, report: Callable[[str], None] = lambda line: None
) -> collections.Counter[str]:
    """Run the cases from number `first` on; counts of what was seen. Raises at the first that fails, naming it."""

    async def all_of_them() -> collections.Counter[str]:
        fuzz, start = Fuzz(seed, walker), time.monotonic()
        for number in range(first, first + cases):
            try:
                await fuzz.case(number)
            except BaseException as error:
                failing(error, seed, number)
                raise
            if (number - first + 1) % 1000 == 0:
                report(f"{number - first + 1} of {cases}, {time.monotonic() - start:.0f} s, {dict(fuzz.checks.counts)}")
        return fuzz.checks.counts

    return asyncio.run(all_of_them())


def run_served(
    cases: int, tp: int, walker: Walker, seed: int, first: int, report: Callable[[str], None]
) -> collections.Counter[str]:
    """The same by a server of `tp` ranks on the CPU, with random weights."""
    checks, start = Checks(walker), time.monotonic()
    shape = (f"model.random_shape.{name}={value}" for name, value in SHAPE.items())
    buckets = (f"buckets.{bucket}" for bucket in SMALL)
    model = ("model=gpt-oss-20b", "model.weights=random", "kernels.device=cpu", f"tp={tp}")

    async def one(client: httpx.AsyncClient, number: int) -> None:
        case = random_case(random.Random(f"{seed} served {number}"), real=True)
        answer = await client.post(case.route.path, json=streaming(case, False))
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            checks.counts["refused"] += 1
            return
        checks.check(case, answer.json())
        if "seed" in case.body or case.body["temperature"] == 0:
            streamed = await client.post(case.route.path, json=streaming(case, True))
            assert_equal(case, answer.json(), streamed.text, usage=False)
            checks.counts["streamed"] += 1

    async def all_of_them(url: str) -> None:
        numbers = iter(range(first, first + cases))
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:

            async def some() -> None:
                for number in numbers:
                    try:
                        await one(client, number)
                    except BaseException as error:
                        failing(error, seed, number, f" --tp {tp}")
                        raise
                    if (number - first + 1) % 100 == 0:
                        report(
                            f"{number - first + 1} of {cases}, {time.monotonic() - start:.0f} s, {dict(checks.counts)}"
                        )

            async with asyncio.TaskGroup() as group:
                for _ in range(TOGETHER):
                    group.create_task(some())

    with Served(*model, *shape, *buckets) as server:
        asyncio.run(all_of_them(server.wait_ready().url))
    return checks.counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes forms of answers.")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--tp", type=int, help="by a model with random weights on so many ranks; default: engine faked")
    given = parser.parse_args()
    walker = Walker()

    def say(line: str) -> None:
        print(line, flush=True)

    if given.tp:
        counts = run_served(given.cases, given.tp, walker, given.seed, given.first, say)
    else:
        counts = run(given.cases, walker, given.seed, given.first, say)
    say(f"{given.cases} cases, no failure: {dict(counts)}")


if __name__ == "__main__":
    main()
