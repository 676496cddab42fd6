"""The harmony format: chat messages to token ids, and generated token ids back to messages.

Knows roles, channels and recipients; nothing of HTTP, of stop strings or of the reply's JSON. The system message is
rendered by OpenAI's library. Everything a client writes is rendered here, message by message, with the tokenizer that
encodes control tokens in text as text. The library's parsers raise on output that real models produce; `Parser` accepts
any tokens.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from openai_harmony import (
    Conversation,
    DeveloperContent,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
)

from conf.limits import CALL, CHANNEL, CONSTRAIN, END, ENDOFTEXT, FIRST_SPECIAL, MESSAGE, RETURN, START
from engine.tokenizer import Tokenizer
from serve.schema import describe
from serve.text import utf8_decoder

FUNCTIONS = "functions."  # before a function's name where it is a recipient or an author


class Call(NamedTuple):
    """A function that the assistant called."""

    name: str
    arguments: str  # JSON, as the model wrote it


@dataclass(frozen=True)
class Turn:
    """One message of the conversation as the client sent it."""

    role: str  # system, developer, user, assistant or tool
    content: str
    reasoning: str = ""  # an assistant's
    calls: tuple[Call, ...] = ()  # an assistant's, after its content
    name: str = ""  # of the function whose answer this is: a tool's


class Function(NamedTuple):
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, object] | None  # JSON schema of an object


def render(
    turns: list[Turn],
    effort: str,
    today: datetime.date,
    tokenizer: Tokenizer,
    limit: int,
    functions: Sequence[Function] = (),
) -> list[int]:
    """The prompt for the assistant's next message; it ends with `<|start|>assistant`.

    System and developer turns become developer messages, as in OpenAI's chat template. Functions are described in the
    first message, or in a developer message before it. Reasoning before the last user message is dropped: the model was
    trained to see only the reasoning since then, between its calls and their answers. Rendering stops early once there
    are more than `limit` ids.

    Raises SchemaError for functions that cannot be described.
    """
    ids, tools = _system_message(effort, today, tokenizer, functions)
    if tools and not (turns and turns[0].role in ("system", "developer")):
        ids += _message(tokenizer, limit, "developer", tools)
    last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            if turn.reasoning and i > last_user:
                ids += _message(tokenizer, limit, "assistant", turn.reasoning, "analysis")
            if turn.content:  # before a call it is a preamble
                ids += _message(tokenizer, limit, "assistant", turn.content, "commentary" if turn.calls else "final")
            for call in turn.calls:
                ids += [START, *tokenizer.encode("assistant"), *call_header(tokenizer, call.name)]
                ids += [*tokenizer.encode(call.arguments, limit), CALL]
        elif turn.role == "tool":
            ids += _message(tokenizer, limit, FUNCTIONS + turn.name, turn.content, "commentary to=assistant")
        elif turn.role == "user":
            ids += _message(tokenizer, limit, "user", turn.content)
        else:
            content = f"# Instructions\n\n{turn.content}" + (f"\n\n{tools}" if tools and i == 0 else "")
            ids += _message(tokenizer, limit, "developer", content)
        if len(ids) > limit:
            break
    return [*ids, START, *tokenizer.encode("assistant")]


def call_header(tokenizer: Tokenizer, name: str) -> list[int]:
    """The header of a call, which follows `<|start|>assistant`, up to the call's arguments."""
    return [
        CHANNEL,
        *tokenizer.encode(f"commentary to={FUNCTIONS}{name} "),
        CONSTRAIN,
        *tokenizer.encode("json"),
        MESSAGE,
    ]


def any_call_header(tokenizer: Tokenizer) -> list[int]:
    """The header of a call up to the function's name; not its dot, which is part of the name's first token."""
    return [CHANNEL, *tokenizer.encode("commentary to=functions")]


def _message(tokenizer: Tokenizer, limit: int, role: str, content: str, channel: str | None = None) -> list[int]:
    header = [CHANNEL, *tokenizer.encode(channel)] if channel else []
    return [START, *tokenizer.encode(role), *header, MESSAGE, *tokenizer.encode(content, limit), END]


def _system_message(
    effort: str, today: datetime.date, tokenizer: Tokenizer, functions: Sequence[Function]
) -> tuple[list[int], str]:
    """The system message, which mentions functions if there are any, and the text that describes them to the model."""
    system = SystemContent(
        reasoning_effort=ReasoningEffort(effort.capitalize()), conversation_start_date=today.isoformat()
    )
    message, encoding = Message.from_role_and_content(Role.SYSTEM, system), tokenizer.encoding
    if not functions:
        return encoding.render(message), ""
    named = DeveloperContent.new().with_function_tools([ToolDescription.new(f.name, "") for f in functions])
    messages = [message, Message.from_role_and_content(Role.DEVELOPER, named)]  # the system message mentions functions
    ids = encoding.render_conversation(
        Conversation.from_messages(messages), RenderConversationConfig(auto_drop_analysis=False)
    )
    return ids[: ids.index(END) + 1], describe(functions)


SegmentKind = Literal["content", "reasoning", "call", "hidden"]


@dataclass(frozen=True)
class Segment:
    """The header of one generated message."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None  # a tool, where the message is a call
    content_type: str | None = None

    @cached_property
    def kind(self) -> SegmentKind:
        """What its text is to the client; "hidden" is not for the client at all.

        A preamble (commentary without a recipient) is content: the format describes it as written for the user. So is
        text on an unknown channel or without one: the client pays for it. A function may be called on any channel.
        Messages to other tools are hidden, and messages that the model invents for other roles.
        """
        if self.role == "assistant" and self.function:
            return "call"
        if self.role != "assistant" or self.recipient not in (None, "all", "user", "assistant"):
            return "hidden"
        return "reasoning" if self.channel == "analysis" else "content"

    @property
    def function(self) -> str:
        """The name of the called function; empty where the message is no call of a function."""
        recipient = self.recipient or ""
        return recipient.removeprefix(FUNCTIONS) if recipient.startswith(FUNCTIONS) else ""


class Event(NamedTuple):
    """Text of a message, and the range of generated tokens (counted from 0) that it comes from.

    The range is empty where the text belongs to an earlier token.
    """

    segment: Segment
    text: str
    start: int
    stop: int


_CHANNELS = ("analysis", "commentary", "final")
_MAX_FIELD = 128  # characters; longer text without <|message|> is the text of a message
# The fields of a header, by the token they follow: <|start|>; a message's end, or the prompt's `<|start|>assistant`;
# <|channel|>; <|constrain|>. The role is optional after a message's end: it can only be the assistant's.
_ROLE = re.compile(
    r"(?P<role>assistant|user|system|developer|(?:functions|browser|python)[\w.-]*)?(?:\s+to=(?P<recipient>\S*))?"
)
_OPTIONAL_ROLE = re.compile(r"(?:assistant)?(?:\s*to=(?P<recipient>\S*))?")
_CHANNEL = re.compile(
    r"\s*(?P<channel>analysis|commentary|final|[\w-]*)(?:\s+to=(?P<recipient>\S*)(?:\s+(?P<content_type>\S+))?)?"
)
_CONTENT_TYPE = re.compile(r"\s*(?P<content_type>\S*)")
_UNKNOWN_CHANNEL = re.compile(r"[\w-]+(\s+(t|to|to=\S*( +\S*)?)?)?")


class Parser:
    """A state machine over generated token ids, which follow the prompt's `<|start|>assistant`.

    It is either in a header or in the text of a message, and every token is allowed in both:
    - <|start|> and <|channel|> end the message in progress, if any, and continue in a header.
    - <|end|>, <|return|>, <|call|> and <|endoftext|> end it too; the header that follows needs no <|start|>.
    - <|message|> ends the header; in a text it is ignored, as are all other control tokens.
    - Text that cannot belong to a header is the text of a message whose <|message|> was left out.
    """

    def __init__(self, tokenizer: Tokenizer, prefilled: Iterable[int] = ()) -> None:
        """`prefilled`: tokens of the assistant's message that already stand in the prompt."""
        self._token_bytes = tokenizer.token_bytes
        self._position = 0
        self._segment: Segment | None = None  # None: in a header
        self._decoder = utf8_decoder()
        self._open_header(_OPTIONAL_ROLE)
        for token in prefilled:
            self.feed(token)
        self._position = 0

    @property
    def segment(self) -> Segment | None:
        """The message in progress; None in a header."""
        return self._segment

    def feed(self, token: int) -> Event | None:
        """The next generated token. An event's text is empty while a character is incomplete."""
        position = self._position
        self._position += 1
        if token < FIRST_SPECIAL:
            text = self._decoder.decode(self._token_bytes(token))
            if self._segment:
                return Event(self._segment, text, position, self._position)
            return self._header_text(text, position)
        if token == MESSAGE:
            if self._segment:
                return None
            self._segment = Segment(**self._fields)
            self._decoder.reset()
            return Event(self._segment, "", self._position, self._position)  # a call may have no text
        if token in (START, END, RETURN, CALL, ENDOFTEXT):
            event = self.finish()
            self._open_header(_ROLE if token == START else _OPTIONAL_ROLE)
            return event
        if token == CHANNEL:
            event = None
            if self._segment:
                event = self.finish()
                self._open_header(_OPTIONAL_ROLE)
            self._open_field(_CHANNEL)
            return event
        if token == CONSTRAIN and not self._segment:
            self._open_field(_CONTENT_TYPE)
        return None

    def finish(self) -> Event | None:
        """The rest when no token follows: an incomplete character, or held-back text that is no header."""
        text = self._decoder.decode(b"", final=True)
        if self._segment:
            return Event(self._segment, text, self._position, self._position) if text else None
        self._text += text
        rest = self._read_field()
        return self._leave_header(rest, self._position) if rest.strip() else None

    def _open_header(self, field: re.Pattern[str]) -> None:
        self._segment = None
        self._fields: dict[str, str] = {}
        self._open_field(field)

    def _open_field(self, field: re.Pattern[str]) -> None:
        self._decoder.reset()
        self._field, self._text = field, ""
        self._rest_start: int | None = None  # the token where text began that does not belong to the header

    def _read_field(self) -> str:
        """Store what the current field names; returns the text after the field."""
        match = self._field.match(self._text)
        assert match, "every field's pattern matches the empty text"
        values = {name: value for name, value in match.groupdict().items() if value}
        self._fields |= values
        unknown_channel = self._field is _CHANNEL and values.get("channel", "final") not in _CHANNELS
        return self._text if unknown_channel else self._text[match.end() :]

    def _header_text(self, text: str, position: int) -> Event | None:
        """Text in a header: an event once it cannot belong to the header."""
        self._text += text
        rest = self._read_field()
        stripped = rest.strip()
        if not stripped:
            self._rest_start = None
        elif self._rest_start is None:
            self._rest_start = position
        if len(self._text) > _MAX_FIELD:
            return self._leave_header(self._text, position + 1)
        may_name_recipient = "to=".startswith(stripped)  # or is empty
        may_name_channel = rest == self._text and self._field is _CHANNEL and _UNKNOWN_CHANNEL.fullmatch(stripped)
        return None if may_name_recipient or may_name_channel else self._leave_header(rest, position + 1)

    def _leave_header(self, rest: str, stop: int) -> Event:
        """`rest` begins a message without <|message|>. Where it is all text of the current field, the field is void."""
        if rest == self._text:
            for name in self._field.groupindex:
                self._fields.pop(name, None)
        self._segment = Segment(**self._fields)
        start = stop if self._rest_start is None else self._rest_start
        return Event(self._segment, rest, start, stop)
