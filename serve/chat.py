"""POST /v1/chat/completions: messages to a harmony prompt, generated ids to content and reasoning, parts to the reply.

Where a message's text goes is decided by `harmony.Segment.kind`; several messages of one kind are joined as they are,
each call to a function stays its own. Arguments are handed on as the model wrote them.
Reasoning is told twice, as `reasoning_content` and as `reasoning`, because clients look for one or the other. A turn
that ends without content has `content: null`, its reasoning and the engine's finish_reason.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.responses import Response
from starlette.types import Receive

from engine.messages import Delta, FinishReason, TokenLogprobs
from engine.tokenizer import Tokenizer
from serve.generation import Service
from serve.harmony import Call, Event, Function, Parser, Segment, Turn, any_call_header, call_header, render
from serve.protocol import ApiError, ChatMessage, ChatRequest, NamedTool, Tool, check_tokens, parse, sampling_params
from serve.stream import EventFormat, EventStream, collected
from serve.text import StopStrings, StopWatch

DEFAULT_EFFORT = "medium"
MOST_CALLS = 128  # in a message; a model that goes on calling is not listened to


class CallWords(msgspec.Struct, omit_defaults=True):
    """What a part adds to a call: id, type and name at first, then arguments."""

    index: int  # of the call in the message
    function: dict[str, str]
    id: str | None = None
    type: str | None = None


class Words(msgspec.Struct, omit_defaults=True):
    """What a part adds to the message; as a streamed `delta` it tells only what there is."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallWords] | None = None


class Part(msgspec.Struct):
    """What one Delta adds to a choice; as it is on the wire."""

    index: int
    delta: Words
    logprobs: dict[str, list[Any]] | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET

    @property
    def tells(self) -> bool:
        """False for a header, half a character, or what may become a stop string."""
        words = self.delta.content or self.delta.reasoning or self.delta.tool_calls
        return bool(words or self.finish_reason or self.logprobs or self.token_ids is not msgspec.UNSET)


class ChatChoice:
    """Reads one choice. Stop strings and logprobs concern content only, neither reasoning nor calls.

    Stop strings count from the first token that may end the answer: text of the first `min_tokens` holds none.
    """

    def __init__(
        self, index: int, request: ChatRequest, stops: StopStrings, tokenizer: Tokenizer, begun: Sequence[int]
    ) -> None:
        """`begun`: tokens of the answer that stand in the prompt, the beginning of a call that was asked for."""
        self.completion_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self._index, self._tokenizer = index, tokenizer
        self._reasoning = request.include_reasoning is not False
        self._with_ids = bool(request.return_token_ids)
        self._min_tokens = request.min_tokens or 0
        self._parser = Parser(tokenizer, begun)
        self._may_call = bool(request.tools) and request.tool_choice != "none"
        self._most_calls = 1 if request.parallel_tool_calls is False else MOST_CALLS
        named = self._parser.segment  # a call begun with all of its header
        self._calls: list[Segment] = [named] if named else []
        self._first_call: list[CallWords] = [self._call_words(0, named)] if named else []
        self._watch = StopWatch(stops)
        self._logprobs: list[TokenLogprobs] = []
        self._tokens: list[int] = []  # with logprobs: an event may concern tokens of earlier Deltas

    def feed(self, delta: Delta) -> Part:
        self.cached_tokens += delta.cached_tokens or 0
        content, reasoning, calls, entries, used = "", "", self._first_call, [], 0
        self._first_call = []
        if delta.logprobs is not None:
            self._tokens += delta.tokens
            self._logprobs += delta.logprobs
        end = len(delta.tokens) if delta.finish_reason == "stop" else 0
        for used, token in enumerate(delta.tokens, 1):
            self.completion_tokens += 1
            if used == end:
                break  # a stop token is not in the text
            event = self._parser.feed(token)
            if event is None:
                continue
            if event.segment.kind == "reasoning":
                reasoning += event.text
                self.reasoning_tokens += event.stop - event.start
            elif event.segment.kind == "content":
                content += self._visible(event)
                entries += self._entries(event)
                if self._watch.stopped:
                    break
            elif event.segment.kind == "call":
                self._call(event, calls)
        if delta.finish_reason and not self._watch.stopped:
            event = self._parser.finish()
            if event and event.segment.kind == "reasoning":
                reasoning += event.text
            elif event and event.segment.kind == "content":
                content += self._visible(event)
                entries += self._entries(event)
            elif event and event.segment.kind == "call":
                self._call(event, calls)
            content += self._watch.finish()
        reasoning = reasoning if self._reasoning else ""
        words = Words(
            content=content or None,
            reasoning_content=reasoning or None,
            reasoning=reasoning or None,
            tool_calls=calls or None,
        )
        finish_reason: Any = "stop" if self._watch.stopped else delta.finish_reason
        if finish_reason == "stop" and self._calls:
            finish_reason = "tool_calls"
        part = Part(self._index, words, {"content": entries} if entries else None, finish_reason)
        if self._with_ids:
            part.token_ids = delta.tokens[:used]
        return part

    def _call(self, event: Event, words: list[CallWords]) -> None:
        """Add what the event says of a call; a message is one call, and one past the last allowed is none."""
        if not self._may_call:
            return
        if not self._calls or self._calls[-1] is not event.segment:
            if len(self._calls) == self._most_calls:
                return
            self._calls.append(event.segment)
            words.append(self._call_words(len(self._calls) - 1, event.segment))
        if event.text and words and words[-1].index == len(self._calls) - 1:
            words[-1].function["arguments"] += event.text
        elif event.text:
            words.append(CallWords(len(self._calls) - 1, {"arguments": event.text}))

    @staticmethod
    def _call_words(index: int, segment: Segment) -> CallWords:
        begun = {"name": segment.function, "arguments": ""}
        return CallWords(index, begun, id=f"call_{secrets.token_hex(12)}", type="function")

    def _visible(self, event: Event) -> str:
        return event.text if self.completion_tokens <= self._min_tokens else self._watch.feed(event.text)

    def _entries(self, event: Event) -> list[dict[str, Any]]:
        if not self._logprobs:
            return []

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._tokenizer.token_text(token),
                "logprob": logprob,
                "bytes": list(self._tokenizer.token_bytes(token)),
            }

        return [
            entry(self._tokens[i], told.logprob)
            | {"top_logprobs": [entry(*top) for top in zip(told.top_ids, told.top_logprobs, strict=True)]}
            for i in range(event.start, event.stop)
            if (told := self._logprobs[i])
        ]


async def create(service: Service, body: bytes, receive: Receive) -> Response | None:
    """Answers the request; None when the client went away. Raises ApiError."""
    service.accepting()
    request, headers = parse(body, ChatRequest)
    ready = service.accepting(request.model)
    _check(request)
    begun = begun_call(request, service.tokenizer)
    prompt = await prompt_of(
        service,
        len(body),
        request.messages,
        None if request.tool_choice == "none" else request.tools,
        request.reasoning_effort or DEFAULT_EFFORT,
        ready.max_context,
    )
    prompt += begun
    sampling = sampling_params(
        request,
        len(prompt),
        ready,
        prompt_field="messages",
        default_max=None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    check_tokens(prompt, ready, "messages")
    stops = StopStrings(request.stop_strings)
    n = request.n or 1
    generation = service.submit(
        [(prompt, sampling)], n, lambda _, index: ChatChoice(index, request, stops, service.tokenizer, begun)
    )
    constant = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.model_name}
    told = {"prompt_token_ids": prompt} if request.return_token_ids else {}
    seconds = service.server.request_timeout
    if request.stream:
        form = EventFormat({**constant, "object": "chat.completion.chunk"}, request.include_usage)
        begin = [Part(index, Words(role="assistant", content=""), None, None) for index in range(n)]
        opening = b"".join(form.event(part, told if part.index == 0 else None) for part in begin)
        return EventStream(generation, form, opening, seconds, headers)
    by_choice = await collected(generation, seconds, receive)
    if by_choice is None:
        return None
    reply = {
        **constant,
        "object": "chat.completion",
        "choices": [_join(parts) for parts in by_choice],
        "usage": generation.usage(),
        **told,
    }
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=headers)


async def prompt_of(
    service: Service, size: int, messages: list[ChatMessage], tools: list[Tool] | None, effort: str, limit: int
) -> list[int]:
    """The harmony prompt of a body of `size` bytes. Raises ApiError 400."""
    functions = [
        Function(tool.function.name, tool.function.description or "", tool.function.parameters) for tool in tools or []
    ]
    turns = turns_of(messages)
    try:
        return await service.encoded(size, render, turns, effort, service.today(), service.tokenizer, limit, functions)
    except ValueError as error:
        raise ApiError(400, f"the tools cannot be described to the model: {error}", "tools") from None


def begun_call(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """With a tool_choice that demands a call, its beginning: the model has no choice but to go on with it."""
    if isinstance(request.tool_choice, NamedTool):
        return call_header(tokenizer, request.tool_choice.function.name)
    if request.tool_choice == "required" and request.tools:
        only = request.tools[0].function.name
        return call_header(tokenizer, only) if len(request.tools) == 1 else any_call_header(tokenizer)
    return []


def turns_of(messages: list[ChatMessage]) -> list[Turn]:
    """Messages as harmony takes them. Raises ApiError 400 for what is no text, and for answers to calls nobody made."""
    called: dict[str, str] = {}  # the function's name by the call's id
    turns = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        content = message.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise ApiError(
                        400,
                        f"content parts of type {part.type!r} are not supported: text only",
                        f"{where}.content",
                        "unsupported_parameter",
                    )
            content = "".join(part.text or "" for part in content)
        if message.function_call is not None:
            raise ApiError(
                400, "function_call is not supported: use tool_calls", f"{where}.function_call", "unsupported_parameter"
            )
        if message.tool_calls and message.role != "assistant":
            raise ApiError(400, f"a message of the role {message.role} calls nothing", f"{where}.tool_calls")
        reasoning, calls, name = message.reasoning_content or message.reasoning or "", message.tool_calls or [], ""
        if content is None and not (message.role == "assistant" and (reasoning or calls)):
            raise ApiError(400, f"a message of the role {message.role} needs content", f"{where}.content")
        if message.role == "tool":
            name = called.get(message.tool_call_id or "", "")
            if not name:
                raise ApiError(
                    400,
                    f"tool_call_id {message.tool_call_id!r} is of no call in an earlier message",
                    f"{where}.tool_call_id",
                )
        called |= {call.id: call.function.name for call in calls}
        made = tuple(Call(call.function.name, call.function.arguments) for call in calls)
        turns.append(Turn(message.role, content or "", reasoning, made, name))
    return turns


def _check(request: ChatRequest) -> None:
    names = [tool.function.name for tool in request.tools or []]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", "tools")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        raise ApiError(
            400, f"tool_choice names {request.tool_choice.function.name!r}, which is not among tools", "tool_choice"
        )
    if request.tool_choice == "required" and not names:
        raise ApiError(400, "tool_choice required needs tools", "tool_choice")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")


def _join(parts: list[Part]) -> dict[str, Any]:
    """The whole choice, as the non-streaming reply has it."""
    content = "".join(part.delta.content or "" for part in parts)
    reasoning = "".join(part.delta.reasoning or "" for part in parts)
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs["content"]]
    calls: list[dict[str, Any]] = []
    for told in (words for part in parts for words in part.delta.tool_calls or []):
        if told.index == len(calls):
            calls.append({"id": told.id, "type": told.type, "function": {**told.function}})
        else:
            calls[told.index]["function"]["arguments"] += told.function["arguments"]
    choice: dict[str, Any] = {
        "index": parts[0].index,
        "message": {
            "role": "assistant",
            "content": content or None,
            "reasoning_content": reasoning or None,
            "reasoning": reasoning or None,
            **({"tool_calls": calls} if calls else {}),
        },
        "logprobs": {"content": entries} if entries else None,
        "finish_reason": parts[-1].finish_reason,
    }
    if parts[0].token_ids is not msgspec.UNSET:
        choice["token_ids"] = [token for part in parts for token in part.token_ids]
    return choice
