"""Generated tokens to the assistant's message: content, reasoning, tool calls and log probabilities.

A message's text goes where `harmony.Segment.kind` says: the texts of several messages of one kind are joined, each call
of a function stays a call of its own. Arguments are passed on as the model wrote them. Reasoning has two names,
`reasoning_content` and `reasoning`, because some clients read one and some the other. An answer that ends without
content has `content: null`, its reasoning and the engine's finish_reason.

What the model wrote to or as somebody else (a call of what was not offered, or of more than was allowed, a message of
another role) is told in plain sentences at the end: as `hidden`, or, where the answer would have neither content nor a
call, as its content, which every client shows.
"""

import secrets
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from engine.messages import Delta, FinishReason, TokenLogprobs
from engine.tokenizer import Tokenizer
from serve.harmony import Event, Parser, Segment
from serve.prompt import PromptReader
from serve.protocol import ChatRequest, JsonObject
from serve.text import StopMatcher, StopStrings, token_names

MAX_TOOL_CALLS = 128  # of a message; further ones are dropped


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """What an event adds to a call: id, type and name at first, then arguments."""

    index: int  # of the call in the message
    function: dict[str, str]  # name and arguments; after the first delta only what is to be appended to the arguments
    id: str | None = None
    type: str | None = None


class MessageDelta(msgspec.Struct, omit_defaults=True):
    """What an event adds to the message; only the fields that it adds to are encoded."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    hidden: str | None = None


class Logprob(msgspec.Struct):
    """A token's text, its natural-log probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: "list[Logprob] | msgspec.UnsetType" = (
        msgspec.UNSET
    )  # of a generated token: the likeliest in its place


class ChatDelta(msgspec.Struct):
    """What one Delta of the engine adds to a choice: the element of `choices` in an event."""

    index: int
    delta: MessageDelta
    logprobs: dict[Literal["content"], list[Logprob]] | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET

    @property
    def has_output(self) -> bool:
        """False for a header, an incomplete character, or text that may become a stop string."""
        text = self.delta.content or self.delta.reasoning or self.delta.tool_calls
        return bool(text or self.finish_reason or self.logprobs or self.token_ids is not msgspec.UNSET)


class ChatChoice:
    """Reads one choice. Stop strings and log probabilities concern content only, neither reasoning nor calls.

    Stop strings count from the first token that may end the answer: the text of the first `min_tokens` is not searched.
    """

    def __init__(
        self,
        index: int,
        request: ChatRequest,
        functions: Sequence[str],
        stops: StopStrings,
        tokenizer: Tokenizer,
        prefilled: Sequence[int],
        prompt: PromptReader | None = None,
    ) -> None:
        """`functions`: names of those that may be called. `prefilled`: tokens of the answer that stand in the prompt:
        the header of a demanded call, or a text.

        `prompt` reads the prompt's log probabilities.
        """
        self.completion_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self._index = index
        self._include_reasoning = request.include_reasoning is not False
        self._return_token_ids = bool(request.return_token_ids)
        self._min_tokens = request.min_tokens or 0
        self._parser = Parser(tokenizer, prefilled, functions)
        self._calls = ToolCalls(1 if request.parallel_tool_calls is False else MAX_TOOL_CALLS, self._parser.segment)
        self._hidden = Hidden()
        self._has_content = False
        self._stop_matcher = StopMatcher(stops)
        self._logprobs = LogprobReader(tokenizer, request.return_tokens_as_token_ids)
        self._prompt = prompt

    def feed(self, delta: Delta) -> ChatDelta:
        """What `delta` adds that the client may see."""
        self.cached_tokens += delta.cached_tokens or 0
        if self._prompt:
            self._prompt.feed(delta.prompt_logprobs or [])
        self._logprobs.feed(delta)
        previous_tokens = self.completion_tokens
        content, reasoning, logprobs = "", "", []
        for event in self._events(delta):
            if event.segment.kind == "reasoning":
                self.reasoning_tokens += event.stop - event.start
                reasoning += event.text
            elif event.segment.kind == "content":
                content += self._visible(event.text)
                logprobs += self._logprobs.entries(event)
            elif event.segment.kind == "hidden":
                self._hidden.feed(event, event.segment.told)
            elif not self._calls.feed(event):
                self._hidden.feed(event, f"The model called {event.segment.function}, one call more than allowed: ")
        if delta.finish_reason:
            content += self._stop_matcher.finish()
        self._has_content = self._has_content or bool(content)
        finish_reason = self._finish_reason(delta)
        hidden = self._hidden.text if finish_reason else ""
        if not (self._has_content or self._calls):
            content, hidden = hidden, ""
        reasoning = reasoning if self._include_reasoning else ""
        message = MessageDelta(
            content=content or None,
            reasoning_content=reasoning or None,
            reasoning=reasoning or None,
            tool_calls=self._calls.take_deltas() or None,
            hidden=hidden or None,
        )
        chat_delta = ChatDelta(self._index, message, {"content": logprobs} if logprobs else None, finish_reason)
        if self._return_token_ids:
            chat_delta.token_ids = delta.tokens[: self.completion_tokens - previous_tokens]
        return chat_delta

    def _events(self, delta: Delta) -> Iterator[Event]:
        """The parser's events for the Delta's tokens, the last of them left out where it is a stop token.

        Stops after the token that completes a stop string, which the reader of the events notices.
        """
        stop_position = len(delta.tokens) - 1 if delta.finish_reason == "stop" else None
        for position, token in enumerate(delta.tokens):
            self.completion_tokens += 1
            if position == stop_position:
                break
            if event := self._parser.feed(token):
                yield event
                if self._stop_matcher.stopped:
                    return
        if delta.finish_reason and (event := self._parser.finish()):
            yield event

    def _visible(self, text: str) -> str:
        """The content that stop strings leave."""
        return text if self.completion_tokens <= self._min_tokens else self._stop_matcher.feed(text)

    def _finish_reason(self, delta: Delta) -> FinishReason | Literal["tool_calls"] | None:
        reason = "stop" if self._stop_matcher.stopped else delta.finish_reason
        return "tool_calls" if reason == "stop" and self._calls else reason


class ToolCalls:
    """The calls of one message: each message of the model that is addressed to a function is a call."""

    def __init__(self, max_calls: int, prefilled: Segment | None) -> None:
        """`prefilled`: the message whose whole header stands in the prompt, if any."""
        self._max_calls = max_calls
        self._segments: list[Segment] = []
        self._deltas: list[ToolCallDelta] = []  # not taken yet
        if prefilled and prefilled.kind == "call":
            self._begin(prefilled)

    def __len__(self) -> int:
        return len(self._segments)

    def feed(self, event: Event) -> bool:
        """Text of a call; False for a call past the last allowed one."""
        if not self._segments or self._segments[-1] is not event.segment:
            if len(self._segments) >= self._max_calls:
                return False
            self._begin(event.segment)
        index = len(self._segments) - 1
        if self._deltas and self._deltas[-1].index == index:
            self._deltas[-1].function["arguments"] += event.text
        elif event.text:
            self._deltas.append(ToolCallDelta(index, {"arguments": event.text}))
        return True

    def take_deltas(self) -> list[ToolCallDelta]:
        """What the calls have gained since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _begin(self, segment: Segment) -> None:
        self._segments.append(segment)
        function = {"name": segment.function, "arguments": ""}
        id = f"call_{secrets.token_hex(12)}"
        self._deltas.append(ToolCallDelta(len(self._segments) - 1, function, id=id, type="function"))


class Hidden:
    """The messages of a choice that are not handed out, a line or more for each."""

    def __init__(self) -> None:
        self.text = ""
        self._segment: Segment | None = None  # whose text came last

    def feed(self, event: Event, told: str) -> None:
        """Text of such a message; `told` says what the message is."""
        if event.segment is not self._segment:
            self._segment = event.segment
            self.text += ("\n" if self.text else "") + told
        self.text += event.text


class LogprobReader:
    """The log probabilities of one choice's tokens, found by the position of a token in the answer."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool | None) -> None:
        """`as_ids`: tokens are named by their ids."""
        self._token_bytes, self._name = tokenizer.token_bytes, token_names(tokenizer, as_ids)
        self._tokens: list[int] = []  # all of the answer's: an event may concern tokens of earlier Deltas
        self._logprobs: list[TokenLogprobs] = []

    def feed(self, delta: Delta) -> None:
        """Note the tokens of a request that asks for log probabilities."""
        if delta.logprobs is not None:
            self._tokens += delta.tokens
            self._logprobs += delta.logprobs

    def entries(self, event: Event) -> list[Logprob]:
        """Those of an event's tokens; none where the request does not ask for them."""
        if not self._logprobs:
            return []
        entries = []
        for position in range(event.start, event.stop):
            sampled = self._logprobs[position]
            entries.append(self._entry(self._tokens[position], sampled.logprob))
            entries[-1].top_logprobs = list(map(self._entry, sampled.top_ids, sampled.top_logprobs))
        return entries

    def _entry(self, token: int, logprob: float) -> Logprob:
        return Logprob(self._name(token), logprob, list(self._token_bytes(token)))


def whole_choice(deltas: list[ChatDelta]) -> JsonObject:
    """All deltas of a choice as the element of `choices` in a reply that is not streamed."""
    content = "".join(delta.delta.content or "" for delta in deltas)
    reasoning = "".join(delta.delta.reasoning or "" for delta in deltas)
    hidden = deltas[-1].delta.hidden
    logprobs = [entry for delta in deltas if delta.logprobs for entry in delta.logprobs["content"]]
    calls: list[ToolCallDelta] = []
    for call in (call for delta in deltas for call in delta.delta.tool_calls or []):
        if call.index == len(calls):
            calls.append(ToolCallDelta(call.index, {**call.function}, call.id, call.type))
        else:
            calls[call.index].function["arguments"] += call.function["arguments"]
    message: JsonObject = {
        "role": "assistant",
        "content": content or None,
        "refusal": None,  # the model's refusals are content; OpenAI's clients expect the field
        "reasoning_content": reasoning or None,
        "reasoning": reasoning or None,
    }
    if calls:
        message["tool_calls"] = [{"id": call.id, "type": call.type, "function": call.function} for call in calls]
    if hidden:
        message["hidden"] = hidden
    choice: JsonObject = {
        "index": deltas[0].index,
        "message": message,
        "logprobs": {"content": logprobs} if logprobs else None,
        "finish_reason": deltas[-1].finish_reason,
    }
    if deltas[0].token_ids is not msgspec.UNSET:
        choice["token_ids"] = [token for delta in deltas for token in delta.token_ids or []]
    return choice
