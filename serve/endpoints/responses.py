"""/v1/responses and what lies below it: OpenAI's Responses API, a writer over harmony's messages.

Each message of the model becomes an item of its own, in order: analysis `reasoning`, text for the user `message`, a
call `function_call` or `custom_tool_call`. A reply that is not streamed is what the last event of a stream holds.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from engine.messages import Delta
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.conversation import demanded_call, rendered, sealed
from serve.generation import Service, Serving
from serve.grammar import Grammar
from serve.guard import cache_salt
from serve.harmony import Event, Function, Parser, Segment
from serve.message import MAX_TOOL_CALLS, Logprob, LogprobReader
from serve.openapi import EVENTS, JSON, documented
from serve.parsing import IGNORED_HEADER, ignored_header, parse, parse_query
from serve.protocol import ApiError, JsonObject, unsupported
from serve.responses import REFERENCE, Item, Offered, Page, ResponsesRequest, custom_input, listed
from serve.sampling import check_tokens, sampling_params
from serve.store import ResponseStore, Stored
from serve.stream import EventStream, TypedEvents, TypedFormat, collected, json_response

Prepared = TypeVar("Prepared")
_PHASES = {"commentary": "commentary", "final": "final_answer"}


class OpenItem:
    """The item that is being written. It is started once it has something to show; a call at once."""

    def __init__(self, segment: Segment, item: JsonObject) -> None:
        """`item`: as it is at first, without text."""
        self.segment, self.item = segment, item
        self.kind = str(item["type"])
        self.started = False
        self.texts: list[str] = []
        self.logprobs: list[Logprob] = []
        self.untold: list[Logprob] = []  # those that no event had so far


class ResponsesChoice:
    """Reads the one choice of a request and writes its events.

    What the model wrote to or as somebody else (a call of what was not offered, say) is a message that begins by saying
    so. A call past the allowed number ends the answer. The text for a custom tool comes at once, when it is whole.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        response: JsonObject,
        offered: Mapping[str, Offered],
        prompt_tokens: int,
        tokenizer: Tokenizer,
        prefilled: Sequence[int],
        keep: Callable[[JsonObject], None],
    ) -> None:
        """`response`: the fields that do not change. `prefilled`: tokens of the answer that stand in the prompt.

        `keep` is called with the response once it is whole.
        """
        self.completion_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self._response, self._offered, self._keep = response, offered, keep
        self._seals_reasoning = request.seals_reasoning
        self._max_calls = 1 if request.parallel_tool_calls is False else MAX_TOOL_CALLS
        self._prompt_tokens = prompt_tokens
        self._parser = Parser(tokenizer, prefilled, list(offered))
        self._logprobs = LogprobReader(tokenizer, as_ids=False)
        self._events: list[JsonObject] = []  # not taken yet
        self._sequence_number = 0
        self._output: list[JsonObject] = []  # items that are complete
        self._calls = 0
        self._open_item: OpenItem | None = None
        self._ended = False  # before a call too many
        for kind in ("created", "in_progress"):
            self._emit(kind, response=self._snapshot("in_progress"))
        self._opening, self._events = self._events, []
        if self._parser.segment:
            self._open(self._parser.segment)

    @property
    def opening(self) -> TypedEvents:
        """The events before the first token."""
        return TypedEvents(self._opening, None)

    def feed(self, delta: Delta) -> TypedEvents:
        """What `delta` adds that the client may see; the last with the response's end."""
        self.cached_tokens += delta.cached_tokens or 0
        self._logprobs.feed(delta)
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
            finish_reason = "stop" if self._ended else delta.finish_reason
            status = "incomplete" if finish_reason == "length" else "completed"
            self._close(status)
            response = self._snapshot(status)
            self._keep(response)
            self._emit(status, response=response)
            if finish_reason == "stop" and self._calls:
                finish_reason = "tool_calls"
        events, self._events = self._events, []
        return TypedEvents(events, finish_reason)

    def failure(self, error: ApiError) -> JsonObject:
        """The event of an answer that fails midway."""
        response = self._snapshot("failed") | {"error": {"code": "server_error", "message": error.message}}
        self._emit("failed", response=response)
        return self._events.pop()

    def _snapshot(self, status: str) -> JsonObject:
        """The response as it is now."""
        is_whole = status in ("completed", "incomplete")
        return self._response | {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(self._output),
            "usage": self._usage() if is_whole else None,
        }

    def _usage(self) -> JsonObject:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self._prompt_tokens + self.completion_tokens,
        }

    def _write(self, event: Event) -> None:
        """Add an event to the item of its message."""
        if event.segment.kind == "reasoning":
            self.reasoning_tokens += event.stop - event.start
        if self._open_item is None or self._open_item.segment is not event.segment:
            self._close("completed")
            self._open(event.segment)
        if self._open_item is not None:
            if event.segment.kind == "content":
                self._open_item.untold += self._logprobs.entries(event)
            self._add_text(self._open_item, event.text)

    def _open(self, segment: Segment) -> None:
        """Begin the item of a message; none for a call too many, which ends the answer."""
        if segment.kind != "call":
            if segment.kind == "reasoning":
                item: JsonObject = {"type": "reasoning", "id": _new_id("rs"), "summary": [], "content": []}
            else:
                item = {"type": "message", "id": _new_id("msg"), "role": "assistant", "content": []}
                if segment.kind == "content" and segment.channel in _PHASES:
                    item["phase"] = _PHASES[segment.channel]
            self._open_item = OpenItem(segment, item)
            if segment.kind == "hidden":
                self._add_text(self._open_item, segment.told)
        elif self._calls == self._max_calls:
            self._ended = True
        else:
            self._calls += 1
            tool = self._offered[segment.function]
            kind, field, prefix = (
                ("custom_tool_call", "input", "ctc") if tool.is_custom else ("function_call", "arguments", "fc")
            )
            item = {"type": kind, "id": _new_id(prefix), "call_id": _new_id("call"), "name": tool.name, field: ""}
            if tool.namespace:
                item["namespace"] = tool.namespace
            self._open_item = OpenItem(segment, item)
            self._start(self._open_item)

    def _start(self, item: OpenItem) -> None:
        item.started = True
        at_first = item.item | {"status": "in_progress"}
        self._emit("output_item.added", output_index=len(self._output), item=at_first)
        if item.kind in ("message", "reasoning"):
            self._emit_of(item, "content_part.added", content_index=0, part=_part(item, ""))

    def _add_text(self, item: OpenItem, text: str) -> None:
        if not text:
            return
        item.texts.append(text)
        if not item.started:
            self._start(item)
        if item.kind == "function_call":
            self._emit_delta(item, "function_call_arguments.delta", text)
        elif item.kind == "reasoning":
            self._emit_delta(item, "reasoning_text.delta", text, content_index=0)
        elif item.kind == "message":
            told, item.untold = item.untold, []
            item.logprobs += told
            self._emit_delta(item, "output_text.delta", text, content_index=0, logprobs=told)

    def _close(self, status: str) -> None:
        """End the item in progress, if any."""
        item, self._open_item = self._open_item, None
        if item is None or not item.started:
            return
        text = "".join(item.texts)
        item.logprobs += item.untold
        done = item.item | {"status": status}
        if item.kind == "function_call":
            done["arguments"] = text
            self._emit_of(item, "function_call_arguments.done", name=done["name"], arguments=text)
        elif item.kind == "custom_tool_call":
            done["input"] = text = custom_input(text)
            self._emit_of(item, "custom_tool_call_input.delta", delta=text)
            self._emit_of(item, "custom_tool_call_input.done", input=text)
        else:
            part = _part(item, text)
            done["content"] = [part]
            if item.kind == "reasoning":
                if self._seals_reasoning:
                    done["encrypted_content"] = sealed(text)
                self._emit_of(item, "reasoning_text.done", content_index=0, text=text)
            else:
                self._emit_of(item, "output_text.done", content_index=0, text=text, logprobs=item.logprobs)
            self._emit_of(item, "content_part.done", content_index=0, part=part)
        self._emit("output_item.done", output_index=len(self._output), item=done)
        self._output.append(done)

    def _emit(self, kind: str, **fields: object) -> None:
        self._events.append({"type": f"response.{kind}", **fields, "sequence_number": self._sequence_number})
        self._sequence_number += 1

    def _emit_of(self, item: OpenItem, kind: str, **fields: object) -> None:
        """An event of the item in progress."""
        self._emit(kind, item_id=item.item["id"], output_index=len(self._output), **fields)

    def _emit_delta(self, item: OpenItem, kind: str, text: str, **fields: object) -> None:
        """Text of the item in progress; what follows another such event of the same item is joined to it."""
        last = self._events[-1] if self._events else {}
        if last.get("type") == f"response.{kind}":
            last["delta"] = str(last["delta"]) + text
            if (logprobs := fields.get("logprobs")) and isinstance(logprobs, list):
                last["logprobs"] = [*_list(last["logprobs"]), *logprobs]
        else:
            self._emit_of(item, kind, delta=text, **fields)


class ResponsesFormat(TypedFormat):
    """The events of this API. There is no [DONE]."""

    def __init__(self, choice: ResponsesChoice) -> None:
        super().__init__()
        self._choice = choice

    def last(self, usage: JsonObject) -> bytes:
        """Nothing: the choice's own last event says how it ended."""
        return b""

    def error(self, error: ApiError) -> bytes:
        return self.line(self._choice.failure(error))


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of this file to `app`."""
    server = service.server
    store = ResponseStore(server.stored_responses, server.stored_bytes, server.stored_seconds)

    @app.post("/v1/responses", openapi_extra=documented(ResponsesRequest, (JSON, EVENTS)))
    async def responses(request: Request) -> Response:
        return await create(service, store, request)

    @app.get("/v1/responses/{id}")
    async def retrieve(request: Request, id: str) -> Response:
        """A response that is kept, as it was."""
        if request.query_params.get("stream", "false") != "false":
            raise unsupported("stream: a response that is kept is not streamed again", "stream")
        body = stored(service, store, request.scope["key_digest"], id).response
        return Response(body, media_type="application/json")

    @app.delete("/v1/responses/{id}")
    async def delete(request: Request, id: str) -> Response:
        """Forget a response."""
        if not store.delete(request.scope["key_digest"], id):
            raise not_stored(service, id)
        return json_response({"id": id, "object": "response", "deleted": True})

    @app.get("/v1/responses/{id}/input_items", openapi_extra=documented(query=Page))
    async def input_items(request: Request, id: str) -> Response:
        """What a response that is kept was the answer to: the conversation before it, page by page."""
        kept = stored(service, store, request.scope["key_digest"], id)
        items = msgspec.json.decode(kept.conversation, type=list[Item])
        page = parse_query(request.query_params, Page)
        return json_response(page.of(listed(items[: len(items) - len(kept.items)])))

    @app.post("/v1/responses/{id}/cancel")
    async def cancel(request: Request, id: str) -> Response:
        """Refused: only responses that are made in the background are cancelled, and here none is."""
        stored(service, store, request.scope["key_digest"], id)
        raise ApiError(
            400, f"{id!r} was not made in the background: a client ends such an answer by closing its connection", "id"
        )

    @app.post("/v1/responses/input_tokens", openapi_extra=documented(ResponsesRequest))
    async def input_tokens(request: Request) -> Response:
        """How many tokens the prompt of a response would have, also where that is more than the context holds."""
        count, headers = await with_kept(service, store, request, counted)
        return json_response({"object": "response.input_tokens", "input_tokens": count}, headers)


async def create(service: Service, store: ResponseStore, http_request: Request) -> Response:
    """Answers a request for a response. Raises ApiError."""
    owner: bytes = http_request.scope["key_digest"]
    made = await with_kept(service, store, http_request, prepared)
    request, prompt, is_stored = made.request, made.prompt, made.is_stored
    sampling = msgspec.structs.replace(made.sampling, grammar=await service.checked(made.grammar))
    id = _new_id("resp")
    response: JsonObject = {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "model": service.model_name,
        "error": None,
        "store": is_stored,
        **made.echo,
    }

    def keep(whole: JsonObject) -> None:
        if is_stored and isinstance(whole["output"], list):
            parts = {str(part["id"]): msgspec.json.encode(part) for part in whole["output"]}
            answer = [msgspec.json.decode(part, type=Item) for part in parts.values()]
            conversation = made.conversation
            if answer:
                conversation = conversation[:-1] + b"," + msgspec.json.encode(answer)[1:]
            store.put(owner, id, Stored(msgspec.json.encode(whole), conversation, parts))

    choice = ResponsesChoice(request, response, made.offered, len(prompt), service.tokenizer, made.prefilled, keep)
    generation = service.submit(
        [(prompt, sampling)], 1, lambda *_: choice, cache_salt(http_request.scope, request.cache_salt)
    )
    seconds = service.server.request_timeout
    if request.stream:
        form = ResponsesFormat(choice)
        return EventStream(generation, form, form.event(choice.opening), seconds, made.headers)
    (deltas,) = await collected(generation, seconds, http_request.receive)
    whole = deltas[-1].events[-1]["response"]
    assert isinstance(whole, dict)
    return json_response(whole, made.headers)


class Named(NamedTuple):
    """The request names what this server may keep, by ids."""

    response: str | None
    items: list[tuple[str, str]]  # (where the id stands, id)


class Kept(NamedTuple):
    """What is kept of what a request names, as JSON."""

    conversation: bytes | None
    items: list[bytes]  # in the order of the request

    @property
    def bytes(self) -> int:
        return len(self.conversation or b"") + sum(map(len, self.items))


async def with_kept(
    service: Service,
    store: ResponseStore,
    http_request: Request,
    prepare: Callable[[Kept | None, bytes, Serving], Prepared | Named],
) -> Prepared:
    """What `prepare(what is kept, body, what is served)` makes of a request; without what is kept it may answer with
    what the request names. Raises ApiError."""
    first = await service.prepared(http_request, partial(prepare, None))
    if not isinstance(first, Named):
        return first
    kept = kept_of(service, store, http_request.scope["key_digest"], first)
    made = await service.prepared(http_request, partial(prepare, kept), kept.bytes)
    assert not isinstance(made, Named)
    return made


class PreparedResponse(NamedTuple):
    """What the body of a request becomes."""

    request: ResponsesRequest  # without input, instructions and tools
    headers: dict[str, str]
    is_stored: bool
    conversation: bytes  # JSON of all its items
    offered: dict[str, Offered]  # without descriptions
    echo: JsonObject
    prompt: list[int]
    prefilled: list[int]  # tokens of the answer at the prompt's end
    sampling: SamplingParams
    grammar: Grammar | None  # what the answer is held to


def prepared(kept: Kept | None, body: bytes, serving: Serving) -> PreparedResponse | Named:
    """What becomes of a request, as `with_kept` asks. Raises ApiError."""
    request, headers = parsed(body, serving)
    if kept is None and (named := named_in(request)):
        return named
    items, earlier = conversation(request, kept)
    offered = request.offered()
    ready = serving.ready
    prompt, prefilled = prompt_of(serving, request, items, earlier, offered, ready.max_context)
    sampling = sampling_params(request.sampling(ready.max_context - len(prompt)), len(prompt), ready)
    check_tokens(prompt, ready, "input")
    echo = request.echo()
    for name in ("instructions", "tools"):  # may be large, and stand in three events
        echo[name] = msgspec.Raw(msgspec.json.encode(echo[name]))
    return PreparedResponse(
        msgspec.structs.replace(request, input="", instructions=None, tools=None),
        headers,
        is_to_be_kept(request, serving),
        msgspec.json.encode(items),
        {name: tool._replace(function=Function(name, "", None)) for name, tool in offered.items()},
        echo,
        prompt,
        prefilled,
        sampling,
        request.grammar(offered),
    )


def counted(kept: Kept | None, body: bytes, serving: Serving) -> tuple[int, dict[str, str]] | Named:
    """The number of a prompt's tokens, and the headers of the answer. Raises ApiError."""
    request, headers = parsed(body, serving)
    if kept is None and (named := named_in(request)):
        return named
    items, earlier = conversation(request, kept)
    prompt, _ = prompt_of(serving, request, items, earlier, request.offered(), serving.server.max_body_bytes)
    return len(prompt), headers


def parsed(body: bytes, serving: Serving) -> tuple[ResponsesRequest, dict[str, str]]:
    """The request, and the header that names all that has no effect. Raises ApiError."""
    request, headers = parse(body, ResponsesRequest)
    serving.require_model(request.model or None)
    request.check()
    unknown = headers.get(IGNORED_HEADER, "").split(", ") if headers else []
    return request, ignored_header({*unknown, *request.ignored(is_to_be_kept(request, serving))})


def is_to_be_kept(request: ResponsesRequest, serving: Serving) -> bool:
    """Whether the answer will be kept."""
    return request.store is not False and serving.server.stored_responses > 0


def prompt_of(
    serving: Serving,
    request: ResponsesRequest,
    items: list[Item],
    earlier: int,
    offered: dict[str, Offered],
    limit: int,
) -> tuple[list[int], list[int]]:
    """The prompt, and its end that belongs to the answer: the header of a demanded call.

    `items`: of the whole conversation, the first `earlier` of them from before the request. Encoding stops soon after
    `limit` tokens. Raises ApiError 400.
    """
    prefilled = demanded_call(serving.tokenizer, names) if (names := request.demanded(offered)) else []
    functions, places = [tool.function for tool in offered.values()], [tool.place for tool in offered.values()]
    turns = request.turns(items, earlier)
    return rendered(serving, turns, functions, request.effort, limit, places) + prefilled, prefilled


def named_in(request: ResponsesRequest) -> Named | None:
    """What the request names; None where it names nothing."""
    items = [(f"input[{i}].id", item.id or "") for i, item in enumerate(request.items) if item.kind == REFERENCE]
    return Named(request.previous_response_id, items) if items or request.previous_response_id is not None else None


def kept_of(service: Service, store: ResponseStore, owner: bytes, named: Named) -> Kept:
    """What is kept of it. Raises ApiError 400 for what is not kept, 413 where it is more than a body could hold."""
    most = service.server.max_body_bytes
    kept = Kept(None, [])
    if named.response is not None:
        kept = Kept(stored(service, store, owner, named.response, "previous_response_id").conversation, [])
    size = kept.bytes
    for place, id in named.items:
        part = store.item(owner, id)
        if part is None:
            raise ApiError(400, f"there is no item {id!r}: {kept_are(service)}", place, "item_not_found")
        kept.items.append(part)
        size += len(part)
        if size > most:
            break
    if size > most:
        raise ApiError(413, f"the conversation that is kept exceeds {most} bytes", "input", "body_too_large")
    return kept


def conversation(request: ResponsesRequest, kept: Kept | None) -> tuple[list[Item], int]:
    """(all items, number of those before this request)."""
    kept = kept or Kept(None, [])
    earlier = [] if kept.conversation is None else msgspec.json.decode(kept.conversation, type=list[Item])
    parts = iter(kept.items)
    items = [msgspec.json.decode(next(parts), type=Item) if item.kind == REFERENCE else item for item in request.items]
    return [*earlier, *items], len(earlier)


def stored(service: Service, store: ResponseStore, owner: bytes, id: str, param: str = "id") -> Stored:
    """The response that the client was given under this id. Raises ApiError as `not_stored` has it."""
    found = store.get(owner, id)
    if found is None:
        raise not_stored(service, id, param)
    return found


def not_stored(service: Service, id: str, param: str = "id") -> ApiError:
    """The answer to an id that is not, or no longer, known.

    404 where the path names it. In a body it is a field at fault: routers take a 404 of the route for its absence.
    """
    status, code = (404, "response_not_found") if param == "id" else (400, "previous_response_not_found")
    return ApiError(status, f"there is no response {id!r}: {kept_are(service)}", param, code)


def kept_are(service: Service) -> str:
    """What this server keeps, in words."""
    server = service.server
    if not server.stored_responses:
        return "this server keeps none"
    return f"kept are the last {server.stored_responses} responses for {server.stored_seconds:g} s, as far as they fit"


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def _part(item: OpenItem, text: str) -> JsonObject:
    """The content of a message or of reasoning."""
    if item.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(item.logprobs)}


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value
