"""The harmony format: chat messages to token ids, and generated token ids back to messages.

Knows roles, channels and recipients; nothing of HTTP, of stop strings or of the reply's JSON. The system message is
rendered by OpenAI's library. Everything a client writes is rendered here, message by message, with the tokenizer that
encodes control tokens in text as text. The library's parsers raise on output that real models produce; `Parser` accepts
any tokens.
"""

import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
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
    preamble: bool = False  # content of an assistant that is not its final answer, although no call is in this turn

    @property
    def is_final(self) -> bool:
        """Whether its content is a final answer."""
        return self.role == "assistant" and bool(self.content) and not self.calls and not self.preamble


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
    first message, or in a developer message before it. Reasoning is dropped once a final answer of the assistant
    follows, its own or a later one: content without a call. An assistant's turn without anything leaves no trace.
    Rendering stops early once there are more than `limit` ids.

    Raises SchemaError for functions that cannot be described.
    """
    ids, tools = _system_message(effort, today, tokenizer, functions)
    if tools and not (turns and turns[0].role in ("system", "developer")):
        ids += _message(tokenizer, limit, "developer", tools)
    finals = [i for i, turn in enumerate(turns) if turn.is_final]
    last_final = finals[-1] if finals else -1
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            if turn.reasoning and i > last_final:
                ids += _message(tokenizer, limit, "assistant", turn.reasoning, "analysis")
            if turn.content:  # before a call it is a preamble
                channel = "final" if turn.is_final else "commentary"
                ids += _message(tokenizer, limit, "assistant", turn.content, channel)
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
_READERS = (None, "all", "user", "assistant")  # recipients whose messages are for the client


@dataclass(frozen=True)
class Segment:
    """The header of one generated message."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None  # as the model wrote it
    content_type: str | None = None
    function: str = ""  # the offered function that the recipient names; empty where the message is no call

    @cached_property
    def kind(self) -> SegmentKind:
        """What its text is to the client; "hidden" is a message for or by somebody else.

        A preamble (commentary without a recipient) is content: the format describes it as written for the user. So is
        text on an unknown channel or without one: the client pays for it. A function may be called on any channel.
        Calls of what was not offered are hidden, and messages that the model invents for other roles.
        """
        if self.role != "assistant":
            return "hidden"
        if self.function:
            return "call"
        if self.recipient not in _READERS:
            return "hidden"
        return "reasoning" if self.channel == "analysis" else "content"

    @property
    def told(self) -> str:
        """What a hidden message is, in words to which its text is added: a reply must not lose it without a word."""
        if self.role != "assistant":
            return f"The model wrote a message of {self.role}: "
        return f"The model called {self.recipient}, which was not offered: "


class Event(NamedTuple):
    """Text of a message, and the range of generated tokens (counted from 0) that it comes from.

    The range is empty where the text belongs to an earlier token.
    """

    segment: Segment
    text: str
    start: int
    stop: int


def offered_function(recipient: str, offered: Collection[str]) -> str:
    """The offered function that a recipient names; empty where it names none.

    The prefix may be missing, and signs may stand around the name, as in `get_weather()`.
    """
    for name in (recipient.removeprefix(FUNCTIONS), recipient, _DECORATION.sub("", recipient).removeprefix(FUNCTIONS)):
        if name in offered and recipient not in _READERS:
            return name
    return ""


_DECORATION = re.compile(r"^\W+|\W+$")
_ROLES = ("assistant", "user", "system", "developer")
_CHANNELS = ("analysis", "commentary", "final")
_TOOLS = ("functions", "browser", "python")  # where the name of a recipient that the model was trained on begins
_MAX_FIELD = 192  # characters, enough for a name of 128; longer text without <|message|> is the text of a message
# A header's fields begin with <|start|>, with a message's end (or the prompt's `<|start|>assistant`), with <|channel|>
# or with <|constrain|>; each begins with the pattern named here. A recipient may follow, then a content type. The role
# is optional after a message's end: it can only be the assistant's.
_ROLE = re.compile(rf"(?P<role>{'|'.join(_ROLES)}|(?:{'|'.join(_TOOLS)})[\w.-]*)?")
_OPTIONAL_ROLE = re.compile(r"(?:assistant)?")
_CHANNEL = re.compile(rf"\s*(?P<channel>{'|'.join(_CHANNELS)}|[\w-]*)")
_CONTENT_TYPE = re.compile(r"\s*(?P<content_type>[\w./+-]*)")
_RECIPIENT = re.compile(r"\s*to=(?P<recipient>[^\s{\[]*)")
_WORD = re.compile(r"\s*[\w./+-]+\s*")  # a content type, if <|message|> or <|constrain|> follows
# Where they do not follow, only these are content types: behind a recipient, and on a message without one.
_TYPE_OF_CALL = re.compile(r"\s*(?P<content_type>json|code)(?=[\s{\[]|$)")
_TYPE_OF_TEXT = re.compile(r"\s+(?P<content_type>json)(?=\s*(?:[{\[]|$))")


class Parser:
    """A state machine over generated token ids, which follow the prompt's `<|start|>assistant`.

    It is either in a header or in the text of a message, and every token is allowed in both:
    - <|start|> and <|channel|> end the message in progress, if any, and continue in a header.
    - <|end|>, <|return|>, <|call|> and <|endoftext|> end it too; the header that follows needs no <|start|>.
    - <|message|> ends the header; in a text it is ignored, as are all other control tokens.
    - Text that cannot belong to a header is the text of a message whose <|message|> was left out.

    What is read depends on the text between control tokens, not on how it was cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prefilled: Iterable[int] = (), functions: Iterable[str] = ()) -> None:
        """`prefilled`: tokens of the assistant's message that already stand in the prompt.

        `functions`: the names that were offered; only their calls are calls.
        """
        self._token_bytes = tokenizer.token_bytes
        self._functions = frozenset(functions)
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
        """The next generated token. An event's text is empty while a character is incomplete.

        Every message has an event, the first one perhaps without text.
        """
        position = self._position
        self._position += 1
        if token < FIRST_SPECIAL:
            text = self._decoder.decode(self._token_bytes(token))
            if self._segment:
                return Event(self._segment, text, position, self._position)
            return self._header_text(text, position)
        if token == MESSAGE:
            return None if self._segment else self._end_header()
        if token in (START, END, RETURN, CALL, ENDOFTEXT):
            event = self.finish()
            self._open_header(_ROLE if token == START else _OPTIONAL_ROLE)
            return event
        if token == CHANNEL:
            return self._open_channel()
        if token == CONSTRAIN and not self._segment and self._field is not _CONTENT_TYPE:
            fields, rest = self._read_field()
            if rest.strip() and not self._may_be_type(rest):
                return self._leave_header()
            self._fields |= fields
            self._take_word(rest)
            self._open_field(_CONTENT_TYPE)
        return None

    def finish(self) -> Event | None:
        """What is left when no token follows: an incomplete character, held-back text, or a call without any text."""
        text = self._decoder.decode(b"", final=True)
        if self._segment:
            return Event(self._segment, text, self._position, self._position) if text else None
        self._text += text
        fields, body = self._without_message()
        known = self._fields | fields
        addressed = known.get("recipient") not in _READERS or known.get("role", "assistant") != "assistant"
        return self._leave_header() if body.strip() or addressed else None

    def _open_header(self, field: re.Pattern[str]) -> None:
        self._segment = None
        self._fields: dict[str, str] = {}
        self._open_field(field)

    def _open_field(self, field: re.Pattern[str]) -> None:
        self._decoder.reset()
        self._field, self._text = field, ""
        self._tokens: list[tuple[int, int]] = []  # (characters of the field's text before it, position) of each token

    def _open_channel(self) -> Event | None:
        """At <|channel|>, which ends a message, or goes on with the header if that has no text of a message yet."""
        event = self.finish() if self._segment else None
        if not self._segment:
            fields, rest = self._read_field() if self._field is _OPTIONAL_ROLE else self._without_message()
            event = self._leave_header() if rest.strip() else None
            self._fields |= fields
        if self._segment:
            self._open_header(_OPTIONAL_ROLE)
        self._open_field(_CHANNEL)
        return event

    def _end_header(self) -> Event:
        """At <|message|>: a word that nothing has explained is the content type; other text belongs to the message."""
        fields, rest = self._read_field()
        self._fields |= fields
        if self._may_be_type(rest):
            self._take_word(rest)
            rest = ""
        self._decoder.reset()
        return self._begin_message(rest if rest.strip() else "")

    def _take_word(self, rest: str) -> None:
        """Store a word that stands where a content type may; a function's name is a recipient without its `to=`."""
        word = rest.strip()
        named = "recipient" not in self._fields and offered_function(word, self._functions)
        if word:
            self._fields["recipient" if named else "content_type"] = word

    def _read_field(self) -> tuple[dict[str, str], str]:
        """What the current field names, and the text behind it."""
        match = self._field.match(self._text)
        assert match, "every field's pattern matches the empty text"
        fields, end = match.groupdict(), match.end()
        while match := _RECIPIENT.match(self._text, end):
            fields["recipient"] = fields.get("recipient") or match["recipient"]
            end = match.end()
        return {name: value for name, value in fields.items() if value}, self._text[end:]

    def _without_message(self) -> tuple[dict[str, str], str]:
        """What the current field names where <|message|> does not follow it, and the text of the message."""
        fields, rest = self._read_field()
        recipient = (self._fields | fields).get("recipient", "")
        if not self._is_header(fields, recipient, rest):
            return {}, self._text
        if self._field is not _OPTIONAL_ROLE and "to=".startswith(rest.strip()):
            return fields, ""  # a header that was cut short
        if self._field is _CONTENT_TYPE:
            return fields, rest.lstrip()
        pattern = _TYPE_OF_CALL if recipient else _TYPE_OF_TEXT
        if (recipient or self._field is _CHANNEL) and (match := pattern.match(rest)):
            return fields | match.groupdict(), rest[match.end() :].lstrip()
        return fields, rest.lstrip() if recipient else rest

    def _is_header(self, fields: dict[str, str], recipient: str, rest: str) -> bool:
        """Whether the current field belongs to a header although <|message|> does not follow it, or is text."""
        function = offered_function(recipient, self._functions)
        if self._field is _CHANNEL:
            channel = fields.get("channel", "")
            cut_short = not rest.strip() and any(name.startswith(channel) for name in _CHANNELS)
            return bool(channel in _CHANNELS or cut_short or not channel or function)
        if self._field is _CONTENT_TYPE:
            return fields.get("content_type", "json") in ("json", "code")
        if self._field is _OPTIONAL_ROLE:
            known = function or recipient in (*_READERS, "") or recipient.startswith(_TOOLS)
            return bool(known or not rest.strip())
        return True

    def _may_be_type(self, rest: str) -> bool:
        """Whether the text behind the current field is one word where a content type may stand."""
        if self._field is _CONTENT_TYPE or not _WORD.fullmatch(rest):
            return False
        return bool(self._read_field()[0].get("recipient")) or (self._field is _CHANNEL and rest[0].isspace())

    def _header_text(self, text: str, position: int) -> Event | None:
        """Text in a header: an event once it cannot belong to the header."""
        self._tokens.append((len(self._text), position))
        self._text += text
        if len(self._text) <= _MAX_FIELD:
            return None if self._may_go_on() else self._leave_header()
        whole, self._text = self._text, self._text[:_MAX_FIELD]
        endless, self._text = self._may_go_on(), whole
        return self._begin_message(whole) if endless else self._leave_header()

    def _may_go_on(self) -> bool:
        """Whether the text behind the current field may still turn out to belong to the header."""
        rest = self._read_field()[1]
        return (
            "to=".startswith(rest.strip())  # or is empty
            or self._may_be_type(rest)
            or (self._field is _ROLE and any(name.startswith(self._text) for name in (*_ROLES, *_TOOLS)))
            or (self._field is _OPTIONAL_ROLE and "assistant".startswith(self._text))
        )

    def _leave_header(self) -> Event:
        """Begin a message without <|message|>."""
        fields, body = self._without_message()
        self._fields |= fields
        return self._begin_message(body)

    def _begin_message(self, text: str) -> Event:
        """`text`: the end of the current field's text, which belongs to the message."""
        function = offered_function(self._fields.get("recipient", ""), self._functions)
        self._segment = Segment(**self._fields, function=function)
        if not text:
            return Event(self._segment, "", self._position, self._position)
        begin = max(before for before, _ in self._tokens if before <= len(self._text) - len(text))
        start = next(position for before, position in self._tokens if before == begin)
        return Event(self._segment, text, start, self._tokens[-1][1] + 1)
