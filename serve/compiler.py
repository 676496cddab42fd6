"""Whether grammars can be compiled, found out in a process of its own: a hostile one may take long, or much memory, or
end the process, and nothing else with it. The engine compiles what has passed.

Knows grammars and their forms; nothing of requests beyond the places that an error names.
"""

import asyncio
import hashlib
import json
import os
import resource
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.lifetime import PARENTS_SIGNALS, dying_with_parent
from serve.grammar import Grammar
from serve.protocol import ApiError, JsonObject

COMPILE_SECONDS = 5.0  # of a grammar
START_SECONDS = 60.0  # of the process; on a busy machine it takes some
MEMORY = 2 * 2**30  # bytes of address space
KNOWN = 256  # grammars that are remembered as good
ANSWER_BYTES = 2**20
CONTROL_TOKENS = (
    "<|the end|>",
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
# The child's modules are found where the parent finds them.
_CHILD = "import sys; sys.path[:] = {path!r}; from serve.compiler import work; work()"
_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")  # whose members are schemas
_SCHEMAS = ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf", "allOf")  # that are schemas, or lists


class Problem(msgspec.Struct):
    """What the child answers: no message where the grammar is good."""

    message: str = ""
    place: str = ""


class GrammarChecker:
    """Checks grammars, one after the other. The process starts with the first, and ends with this one."""

    def __init__(self) -> None:
        self._good: OrderedDict[bytes, None] = OrderedDict()  # digests of their texts, the latest last
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def check(self, grammar: Grammar) -> None:
        """Raises ApiError 400 with the place for a grammar that cannot be compiled, or not within the limits."""
        digest = hashlib.sha256(grammar.text.encode()).digest()
        if digest not in self._good:
            places = [form.place for form in grammar.forms]
            async with self._turn:
                problem = await self._ask(grammar)
            if problem.message:
                place = problem.place or ", ".join(dict.fromkeys(places))
                raise ApiError(400, f"{place}: {problem.message}", problem.place or places[0])
        self._good[digest] = None
        self._good.move_to_end(digest)
        if len(self._good) > KNOWN:
            self._good.popitem(last=False)

    async def _ask(self, grammar: Grammar) -> Problem:
        question = msgspec.json.encode([grammar.text, [(form.grammar, form.place) for form in grammar.forms]])
        try:
            async with asyncio.timeout(START_SECONDS):
                process = self._process or await self._start()
            async with asyncio.timeout(COMPILE_SECONDS):
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(question + b"\n")
                answer = await process.stdout.readline()
            return msgspec.json.decode(answer, type=Problem)
        except (TimeoutError, OSError, msgspec.DecodeError):  # too slow, or it has ended
            self._end()
            return Problem(f"cannot be compiled within {COMPILE_SECONDS:g} s and {MEMORY // 2**30} GiB")
        except BaseException:  # the client went away: an answer to nobody must not be read as another's
            self._end()
            raise

    async def _start(self) -> Process:
        code = _CHILD.format(path=[path or os.getcwd() for path in sys.path])
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,  # what a hostile grammar makes it say fills no log
            limit=ANSWER_BYTES,
            preexec_fn=dying_with_parent(),
        )
        assert process.stdout is not None
        await process.stdout.readline()  # it is ready
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process and process.returncode is None:
            process.kill()


def work() -> None:
    """What the child runs: an empty line, then for each line with a grammar one with a Problem."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    bare, whole = (_Bytes(names).tokenizer() for names in (CONTROL_TOKENS[:1], CONTROL_TOKENS))
    print(flush=True)
    for line in sys.stdin.buffer:
        text, forms = msgspec.json.decode(line, type=tuple[str, list[tuple[JsonObject, str]]])
        sys.stdout.buffer.write(msgspec.json.encode(_problem(bare, whole, text, forms)) + b"\n")
        sys.stdout.buffer.flush()


class _Bytes:
    """A vocabulary of the bytes and some control tokens, as LLTokenizer reads it: a grammar compiles or not whatever
    its tokens are. Forms may name no control token: to them only one is known, which no client has heard of."""

    is_tokenizer_wrapper = True
    eos_token_id = 256
    bos_token_id = None

    def __init__(self, control_tokens: Sequence[str]) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [name.encode() for name in control_tokens]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self, eos_token=[self.eos_token_id])  # type: ignore[arg-type]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _problem(bare: LLTokenizer, whole: LLTokenizer, text: str, forms: Iterable[tuple[JsonObject, str]]) -> Problem:
    """What is wrong with a grammar, or with one of its forms and where in it."""
    for form, place in forms:
        if error := _error(bare, form):
            schema = form.get("json_schema")
            if isinstance(schema, dict):
                place += _place(bare, schema, schema, error)
            return Problem(error, place)
    return Problem(_compile_error(whole, text))


def _error(tokenizer: LLTokenizer, form: JsonObject) -> str:
    return _compile_error(tokenizer, json.dumps({"grammars": [form]}))


def _compile_error(tokenizer: LLTokenizer, grammar: str) -> str:
    """Why a grammar cannot be compiled, or no text begins as it says; empty where there is nothing to say."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        return matcher.get_error()
    matcher.compute_bitmask()
    return "no text is valid" if matcher.is_error() else ""


def _place(tokenizer: LLTokenizer, root: JsonObject, schema: JsonObject, error: str) -> str:
    """Where in `schema` the smallest schema stands that has the same error, as `.properties.x`."""
    shared = {name: root[name] for name in ("$defs", "definitions", "x-guidance") if name in root}
    for where, inner in _inner_schemas(schema):
        if _error(tokenizer, {"json_schema": shared | inner}) == error:
            return where + _place(tokenizer, root, inner, error)
    return ""


def _inner_schemas(schema: Mapping[str, object]) -> Iterator[tuple[str, JsonObject]]:
    for key in _SUBSCHEMAS:
        members = schema.get(key)
        if isinstance(members, dict):
            yield from ((f".{key}.{name}", inner) for name, inner in members.items() if isinstance(inner, dict))
    for key in _SCHEMAS:
        value = schema.get(key)
        if isinstance(value, dict):
            yield f".{key}", value
        elif isinstance(value, list):
            yield from ((f".{key}[{i}]", inner) for i, inner in enumerate(value) if isinstance(inner, dict))
