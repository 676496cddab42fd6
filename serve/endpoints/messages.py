"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, a third writer over harmony's messages.

Each message of the model becomes a block of its own, in order: analysis `thinking`, text for the user `text`, a call
`tool_use`. A reply that is not streamed is made of the same events as a stream. Reasoning that the client did not ask
for is kept, within bounds, by the call that it led to, and told to the model when that call comes back.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from engine.messages import Delta
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.anthropic import INVALID_JSON, CountRequest, MessagesRequest
from serve.conversation import continued, demanded_call, rendered, sealed
from serve.generation import Service, Serving
from serve.grammar import Grammar
from serve.guard import cache_salt
from serve.harmony import Event, Function, Parser, Segment
from serve.message import MAX_TOOL_CALLS
from serve.openapi import EVENTS, JSON, documented
from serve.parsing import IGNORED_HEADER, ignored_header, parse
from serve.protocol import THREAD_UNSUPPORTED, ApiError, JsonObject
from serve.sampling import check_tokens, sampling_params
from serve.store import ResponseStore, Stored
from serve.stream import EventStream, TypedEvents, TypedFormat, collected, json_response
from serve.text import StopMatcher, StopStrings

AnyRequest = TypeVar("AnyRequest", bound=CountRequest)
Prepared = TypeVar("Prepared")
PING_TOKENS = 128  # of reasoning without a delta; then an event says that the answer goes on
SIGNATURE = "unsigned"  # of a thinking block: clients demand one and send it back, nothing here depends on it


class OpenBlock:
    """The block that is being written. It is started once it has something to show; a call at once."""

    def __init__(self, segment: Segment, kind: str, stops: StopStrings) -> None:
        self.segment, self.kind = segment, kind
        self.started = False
        self.stops = StopMatcher(stops)
        self.unshown: list[str] = []  # reasoning without a delta


class MessagesChoice:
    """Reads the one choice of a request. Stop sequences are looked for in each text block by itself.

    What the model wrote to or as somebody else (a call of what was not offered, say) is a text block that begins by
    saying so. A call past the allowed number ends the answer.
    """

    def __init__(
        self,
        request: MessagesRequest,
        functions: Sequence[str],
        prompt_tokens: int,
        max_tokens: int,
        stops: StopStrings,
        tokenizer: Tokenizer,
        prefilled: Sequence[int],
        keep: Callable[[dict[str, bytes]], None],
    ) -> None:
        """`functions`: names of those that may be called. `max_tokens`: what is asked for, or as much of it as the
        context holds. `prefilled`: tokens of the answer that stand in the prompt.

        `keep` is called at the end with the reasoning before each call, by the call's id, where the client got none.
        """
        self.completion_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self._shows_thinking, self._seals_thinking = request.shows_thinking, request.seals_thinking
        self._max_calls = 1 if request.choice.disable_parallel_tool_use else MAX_TOOL_CALLS
        self._length_reason = "max_tokens" if max_tokens == request.max_tokens else "model_context_window_exceeded"
        self._prompt_tokens = prompt_tokens
        self._stops = stops
        self._parser = Parser(tokenizer, prefilled, functions)
        self._events: list[JsonObject] = []  # not taken yet
        self._index = 0  # of the block in progress, or the next
        self._calls = 0
        self._silent_tokens = 0  # since the last event
        self._keep = keep
        self._unkept: list[str] = []  # texts of reasoning since the last call
        self._kept: dict[str, bytes] = {}
        self._block: OpenBlock | None = None
        self._stop_sequence: str | None = None
        self._ended = False  # by a stop sequence, or before a call too many
        if self._parser.segment:
            self._open(self._parser.segment)

    def feed(self, delta: Delta) -> TypedEvents:
        """What `delta` adds that the client may see; the last with the message's end."""
        self.cached_tokens += delta.cached_tokens or 0
        stop_position = len(delta.tokens) - 1 if delta.finish_reason == "stop" else None
        for position, token in enumerate(delta.tokens):
            self.completion_tokens += 1
            if position != stop_position and (event := self._parser.feed(token)):
                self._write(event)
            if self._ended:
                break
        if delta.finish_reason and not self._ended and (event := self._parser.finish()):
            self._write(event)
        finish_reason: str | None = None
        if self._ended or delta.finish_reason:
            self._close()
            finish_reason = "stop" if self._ended else delta.finish_reason
            stop_reason = self._length_reason
            if self._stop_sequence is not None:
                stop_reason = "stop_sequence"
            elif finish_reason == "stop":
                stop_reason = "tool_use" if self._calls else "end_turn"
                finish_reason = "tool_calls" if self._calls else finish_reason
            stop: JsonObject = {"stop_reason": stop_reason, "stop_sequence": self._stop_sequence, "stop_details": None}
            self._events.append({"type": "message_delta", "delta": stop, "usage": self._usage()})
            self._events.append({"type": "message_stop"})
            if self._kept:
                self._keep(self._kept)
        self._silent_tokens = 0 if self._events else self._silent_tokens + len(delta.tokens)
        if self._silent_tokens >= PING_TOKENS:
            self._events, self._silent_tokens = [{"type": "ping"}], 0
        events, self._events = self._events, []
        return TypedEvents(events, finish_reason)

    def _usage(self) -> JsonObject:
        """In this API `input_tokens` are those that were not read from the cache."""
        return {
            "input_tokens": self._prompt_tokens - self.cached_tokens,
            "cache_read_input_tokens": self.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self.reasoning_tokens},
        }

    def _write(self, event: Event) -> None:
        """Add an event to the block of its message."""
        if event.segment.kind == "reasoning":
            self.reasoning_tokens += event.stop - event.start
        if self._block is None or self._block.segment is not event.segment:
            self._close()
            self._open(event.segment)
        block = self._block
        if block is None or not event.text:
            return
        if block.kind == "text":
            self._add_text(block, block.stops.feed(event.text))
            if block.stops.stopped:
                self._stop_sequence, self._ended = block.stops.stop_string, True
        elif block.kind == "tool_use":
            self._add("input_json_delta", "partial_json", event.text)
        else:
            if self._shows_thinking:
                self._start(block, {"type": "thinking", "thinking": "", "signature": ""})
            if self._shows_thinking and not self._seals_thinking:
                self._add("thinking_delta", "thinking", event.text)
            else:
                block.unshown.append(event.text)

    def _open(self, segment: Segment) -> None:
        """Begin the block of a message; none for a call too many, which ends the answer."""
        is_call = segment.kind == "call"
        if is_call and self._calls == self._max_calls:
            self._ended = True
            return
        kind = "tool_use" if is_call else "thinking" if segment.kind == "reasoning" else "text"
        block = self._block = OpenBlock(segment, kind, self._stops)
        if is_call:
            self._calls += 1
            id = f"toolu_{secrets.token_hex(12)}"
            if self._unkept:
                self._kept[id] = "\n\n".join(self._unkept).encode()
                self._unkept = []
            self._start(block, {"type": "tool_use", "id": id, "name": segment.function, "input": {}})
        elif segment.kind == "hidden":
            self._add_text(block, segment.told)

    def _close(self) -> None:
        """End the block in progress, if any."""
        block, self._block = self._block, None
        if block is None:
            return
        if block.kind == "text":
            self._add_text(block, block.stops.finish())
        unshown = "".join(block.unshown)
        if unshown and not block.started:
            self._unkept.append(unshown)
        if not block.started:
            return
        if block.kind == "thinking":
            self._add("signature_delta", "signature", sealed(unshown) if unshown else SIGNATURE)
        self._events.append({"type": "content_block_stop", "index": self._index})
        self._index += 1

    def _start(self, block: OpenBlock, content_block: JsonObject) -> None:
        if not block.started:
            block.started = True
            self._events.append({"type": "content_block_start", "index": self._index, "content_block": content_block})

    def _add_text(self, block: OpenBlock, text: str) -> None:
        if text:
            self._start(block, {"type": "text", "text": ""})
            self._add("text_delta", "text", text)

    def _add(self, kind: str, field: str, text: str) -> None:
        """A delta of the block in progress; one that follows another of its kind is joined to it."""
        delta = self._events[-1].get("delta") if self._events else None
        if isinstance(delta, dict) and delta.get("type") == kind:
            delta[field] += text
            return
        self._events.append({"type": "content_block_delta", "index": self._index, "delta": {"type": kind, field: text}})


class MessagesFormat(TypedFormat):
    """The events of this API."""

    def last(self, usage: JsonObject) -> bytes:
        """Nothing: the choice's own last event says how it ended."""
        return b""

    def error(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + error.anthropic_body() + b"\n\n"


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of this file to `app`."""
    server = service.server
    store = ResponseStore(server.stored_responses, server.stored_bytes, server.stored_seconds)

    @app.post("/v1/messages", openapi_extra=documented(MessagesRequest, (JSON, EVENTS)))
    async def messages(request: Request) -> Response:
        return await create(service, store, request)

    @app.post("/v1/messages/count_tokens", openapi_extra=documented(CountRequest))
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of a message would have, also where that is more than the context holds."""
        count, headers = await with_reasoning(service, store, request, counted)
        return json_response({"input_tokens": count}, headers)


async def create(service: Service, store: ResponseStore, http_request: Request) -> Response:
    """Answers a request for a message. Raises ApiError."""
    made = await with_reasoning(service, store, http_request, prepared)
    request, headers, names, prompt, prefilled, sampling, grammar = made
    sampling = msgspec.structs.replace(sampling, grammar=await service.checked(grammar))
    stops = StopStrings(request.stop_sequences or [])
    id = f"msg_{secrets.token_hex(12)}"

    def keep(reasoning: dict[str, bytes]) -> None:
        store.put(http_request.scope["key_digest"], id, Stored(b"", b"", reasoning))

    generation = service.submit(
        [(prompt, sampling)],
        1,
        lambda *_: MessagesChoice(
            request, names, len(prompt), sampling.max_tokens, stops, service.tokenizer, prefilled, keep
        ),
        cache_salt(http_request.scope, None),
    )
    message: JsonObject = {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": service.model_name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": {"input_tokens": len(prompt), "cache_read_input_tokens": 0, "output_tokens": 0},
    }
    seconds = service.server.request_timeout
    if request.stream:
        form = MessagesFormat()
        opening = form.line({"type": "message_start", "message": message}) + form.line({"type": "ping"})
        return EventStream(generation, form, opening, seconds, headers)
    (deltas,) = await collected(generation, seconds, http_request.receive)
    return json_response(whole_message(message, [event for delta in deltas for event in delta.events]), headers)


class Calls(NamedTuple):
    """The request holds calls, before which there may be reasoning that this server keeps."""

    ids: list[str]


async def with_reasoning(
    service: Service,
    store: ResponseStore,
    http_request: Request,
    prepare: Callable[[Mapping[str, str] | None, bytes, Serving], Prepared | Calls],
) -> Prepared:
    """What `prepare(reasoning by the id of the call after it, body, what is served)` makes of a request; without the
    reasoning it may answer with the calls, to be given what is kept of them. Raises ApiError."""
    first = await service.prepared(http_request, partial(prepare, None if len(store) else {}))
    if not isinstance(first, Calls):
        return first
    owner: bytes = http_request.scope["key_digest"]
    kept = {id: part.decode() for id in first.ids if (part := store.item(owner, id))}
    made = await service.prepared(http_request, partial(prepare, kept), sum(map(len, kept.values())))
    assert not isinstance(made, Calls)
    return made


class PreparedMessage(NamedTuple):
    """What the body of a request becomes."""

    request: MessagesRequest  # without messages, system prompt and tools
    headers: dict[str, str]
    functions: list[str]  # names of those that may be called
    prompt: list[int]
    prefilled: list[int]  # tokens of the answer at the prompt's end
    sampling: SamplingParams
    grammar: Grammar | None  # what the answer is held to


def prepared(reasoning: Mapping[str, str] | None, body: bytes, serving: Serving) -> PreparedMessage | Calls:
    """What becomes of a request, as `with_reasoning` asks. Raises ApiError."""
    request, headers = parsed(body, MessagesRequest)
    if request.thread is not None:
        raise ApiError(400, "no thread is kept: send all messages, without it", "thread", THREAD_UNSUPPORTED)
    serving.require_model(request.model or None)
    if reasoning is None and (ids := request.call_ids):
        return Calls(ids)
    ready, functions = serving.ready, request.functions
    prompt, prefilled = prompt_of(serving, request, functions, ready.max_context, reasoning or {})
    prompt += prefilled
    # As in Anthropic's API, an answer may be cut by the context: a client need not know how long its prompt is.
    max_tokens = max(1, min(request.max_tokens, ready.max_context - len(prompt)))
    sampling = sampling_params(request.sampling(max_tokens), len(prompt), ready)
    check_tokens(prompt, ready, "messages")
    names = [function.name for function in functions]
    lean = msgspec.structs.replace(request, messages=[], system=None, tools=None)
    continues = bool(prefilled) and request.choice.type not in ("any", "tool")
    return PreparedMessage(lean, headers, names, prompt, prefilled, sampling, request.grammar(continues))


def counted(reasoning: Mapping[str, str] | None, body: bytes, serving: Serving) -> tuple[int, dict[str, str]] | Calls:
    """The number of a prompt's tokens, and the headers of the answer. Raises ApiError."""
    request, headers = parsed(body, CountRequest)
    serving.require_model(request.model or None)
    if reasoning is None and (ids := request.call_ids):
        return Calls(ids)
    prompt, prefilled = prompt_of(serving, request, request.functions, serving.server.max_body_bytes, reasoning or {})
    return len(prompt) + len(prefilled), headers


def parsed(body: bytes, kind: type[AnyRequest]) -> tuple[AnyRequest, dict[str, str]]:
    """The request, and the header that names all that has no effect. Raises ApiError 400."""
    request, headers = parse(body, kind)
    unknown = headers.get(IGNORED_HEADER, "").split(", ") if headers else []
    return request, ignored_header({*unknown, *request.ignored})


def prompt_of(
    serving: Serving, request: CountRequest, functions: list[Function], limit: int, reasoning: Mapping[str, str]
) -> tuple[list[int], list[int]]:
    """The prompt up to `<|start|>assistant`, and the tokens of the answer that follow it there: the header of a
    demanded call, or the text of a last message of the assistant, which the model is to go on with.

    `reasoning`: by the id of the call after it. Encoding stops soon after `limit` tokens. Raises ApiError 400.
    """
    turns, tokenizer = request.turns(reasoning), serving.tokenizer
    prefilled: list[int] = []
    last = turns[-1] if turns else None
    if request.choice.type in ("any", "tool"):
        names = [request.choice.name] if request.choice.name else [function.name for function in functions]
        prefilled = demanded_call(tokenizer, names)
    elif last and last.role == "assistant" and last.content and not last.calls:
        turns, prefilled = continued(turns, tokenizer, limit)
    places = [f"tools[{i}].input_schema" for i, tool in enumerate(request.tools or []) if tool.is_function]
    return rendered(serving, turns, functions, request.effort, limit, places), prefilled


def whole_message(message: JsonObject, events: list[JsonObject]) -> JsonObject:
    """A stream as one reply: `message`, as the stream's first event has it, and all later events."""
    blocks: list[dict[str, object]] = []
    texts: list[dict[str, list[str]]] = []  # of each block, by field
    for event in events:
        block, delta = event.get("content_block"), event.get("delta")
        if isinstance(block, dict):
            blocks.append({**block})
            texts.append({})
        elif event["type"] == "message_delta" and isinstance(delta, dict):
            message = message | delta | {"usage": event["usage"]}
        elif isinstance(delta, dict):
            (field,) = delta.keys() - {"type"}
            texts[-1].setdefault(field, []).append(delta[field])
    for whole, fields in zip(blocks, texts, strict=True):
        joined = {field: "".join(parts) for field, parts in fields.items()}
        whole |= {"input": tool_input(joined.get("partial_json", ""))} if whole["type"] == "tool_use" else joined
    return message | {"content": blocks}


def tool_input(arguments: str) -> msgspec.Raw | dict[str, str]:
    """The arguments of a call as an object, unchanged where they are one; none at all are an empty one."""
    try:
        msgspec.json.decode(arguments or "{}", type=dict)
    except (msgspec.MsgspecError, RecursionError):
        return {INVALID_JSON: arguments}
    return msgspec.Raw(arguments.encode() or b"{}")
