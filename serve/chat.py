"""POST /v1/chat/completions: messages to a harmony prompt, generated ids to content and reasoning, parts to the reply.

Where a message's text goes is decided by `harmony.Segment.kind`; several messages of one kind are joined as they are.
Reasoning is told twice, as `reasoning_content` and as `reasoning`, because clients look for one or the other. A turn
that ends without content has `content: null`, its reasoning and the engine's finish_reason.
"""

import secrets
import time
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive

from engine.request import Delta, FinishReason, TokenLogprobs
from serve.generation import Service
from serve.harmony import Event, Parser, Turn, render
from serve.protocol import ApiError, ChatMessage, ChatRequest, check_tokens, parse, sampling_params
from serve.stream import EventFormat, EventStream, collected
from serve.text import StopStrings, StopWatch, Tokenizer

DEFAULT_EFFORT = "medium"


class Words(msgspec.Struct, omit_defaults=True):
    """What a part adds to the message; as a streamed `delta` it tells only what there is."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Part(msgspec.Struct):
    """What one Delta adds to a choice; as it is on the wire."""

    index: int
    delta: Words
    logprobs: dict[str, list[Any]] | None
    finish_reason: FinishReason | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET

    @property
    def tells(self) -> bool:
        """False for a header, half a character, or what may become a stop string."""
        words = self.delta.content or self.delta.reasoning
        return bool(words or self.finish_reason or self.logprobs or self.token_ids is not msgspec.UNSET)


class ChatChoice:
    """Reads one choice. Stop strings and logprobs concern content only, never reasoning.

    Stop strings count from the first token that may end the answer: text of the first `min_tokens` holds none.
    """

    def __init__(self, index: int, request: ChatRequest, stops: StopStrings, tokenizer: Tokenizer) -> None:
        self.completion_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self._index, self._tokenizer = index, tokenizer
        self._reasoning = request.include_reasoning is not False
        self._with_ids = bool(request.return_token_ids)
        self._min_tokens = request.min_tokens or 0
        self._parser = Parser(tokenizer)
        self._watch = StopWatch(stops)
        self._logprobs: list[TokenLogprobs] = []
        self._tokens: list[int] = []  # with logprobs: an event may concern tokens of earlier Deltas

    def feed(self, delta: Delta) -> Part:
        self.cached_tokens += delta.cached_tokens or 0
        content, reasoning, entries, used = "", "", [], 0
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
        if delta.finish_reason and not self._watch.stopped:
            event = self._parser.finish()
            if event and event.segment.kind == "reasoning":
                reasoning += event.text
            elif event and event.segment.kind == "content":
                content += self._visible(event)
                entries += self._entries(event)
            content += self._watch.finish()
        reasoning = reasoning if self._reasoning else ""
        words = Words(content=content or None, reasoning_content=reasoning or None, reasoning=reasoning or None)
        finish_reason = "stop" if self._watch.stopped else delta.finish_reason
        part = Part(self._index, words, {"content": entries} if entries else None, finish_reason)
        if self._with_ids:
            part.token_ids = delta.tokens[:used]
        return part

    def _visible(self, event: Event) -> str:
        return event.text if self.completion_tokens <= self._min_tokens else self._watch.feed(event.text)

    def _entries(self, event: Event) -> list[dict[str, Any]]:
        if not self._logprobs:
            return []

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._tokenizer.token_text(token), "logprob": logprob,
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
    turns = [turn_of(message, i) for i, message in enumerate(request.messages)]
    effort = request.reasoning_effort or DEFAULT_EFFORT
    prompt = await service.encoded(
        len(body), render, turns, effort, service.today(), service.tokenizer, ready.max_context
    )
    sampling = sampling_params(
        request, len(prompt), ready, prompt_field="messages", default_max=None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    check_tokens(prompt, ready, "messages")
    stops = StopStrings(request.stop_strings)
    n = request.n or 1
    generation = service.submit(
        [(prompt, sampling)], n, lambda _, index: ChatChoice(index, request, stops, service.tokenizer)
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
        **constant, "object": "chat.completion", "choices": [_join(parts) for parts in by_choice],
        "usage": generation.usage(), **told,
    }
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=headers)


def turn_of(message: ChatMessage, position: int) -> Turn:
    """A message as harmony takes it. Raises ApiError: 400 for what is no text, 501 for tools."""
    where = f"messages[{position}]"
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise ApiError(501, "tools are not supported by this server yet", where, "tools_not_supported")
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise ApiError(400, f"content parts of type {part.type!r} are not supported: text only",
                               f"{where}.content", "unsupported_parameter")
        content = "".join(part.text or "" for part in content)
    reasoning = message.reasoning_content or message.reasoning or ""
    if content is None and not (message.role == "assistant" and reasoning):
        raise ApiError(400, f"a message of the role {message.role} needs content", f"{where}.content")
    return Turn(message.role, content or "", reasoning)


def _check(request: ChatRequest) -> None:
    if request.tools or request.tool_choice not in (None, "none", "auto"):
        param = "tools" if request.tools else "tool_choice"
        raise ApiError(501, "tools are not supported by this server yet", param, "tools_not_supported")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")


def _join(parts: list[Part]) -> dict[str, Any]:
    """The whole choice, as the non-streaming reply has it."""
    content = "".join(part.delta.content or "" for part in parts)
    reasoning = "".join(part.delta.reasoning or "" for part in parts)
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs["content"]]
    choice: dict[str, Any] = {
        "index": parts[0].index,
        "message": {
            "role": "assistant", "content": content or None,
            "reasoning_content": reasoning or None, "reasoning": reasoning or None,
        },
        "logprobs": {"content": entries} if entries else None,
        "finish_reason": parts[-1].finish_reason,
    }
    if parts[0].token_ids is not msgspec.UNSET:
        choice["token_ids"] = [token for part in parts for token in part.token_ids]
    return choice
