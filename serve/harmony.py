"""The harmony format: chat messages to token ids, and generated token ids back to messages.

Knows roles, channels and recipients; nothing of HTTP, of stop strings or of the reply's JSON. The system message is
rendered by OpenAI's library. Everything a client writes is rendered here, message by message, with the tokenizer that
takes control tokens for text. The library's parsers raise on what real models say; `Parser` has no failing state.
"""

import datetime
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """What the model may call."""

    name: str
    description: str
    parameters: dict[str, Any] | None  # JSON schema of an object


def render(
    turns: list[Turn],
    effort: str,
    today: datetime.date,
    tokenizer: Tokenizer,
    limit: int,
    functions: Sequence[Function] = (),
) -> list[int]:
    """The prompt for the assistant's next message; it ends with `<|start|>assistant`.

    System and developer turns become developer messages, as in OpenAI's chat template; functions are described in the
    first of them. Reasoning of turns before the last user message is dropped: the model was trained to see only that of
    the turn in progress, calls and their answers included. Rendering stops early with more than `limit` ids.

    Raises ValueError for functions that cannot be described.
    """
    ids, tools = _begin(effort, today, tokenizer, functions)
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
    """What makes a message of the assistant a call, up to its arguments."""
    return [
        CHANNEL,
        *tokenizer.encode(f"commentary to={FUNCTIONS}{name} "),
        CONSTRAIN,
        *tokenizer.encode("json"),
        MESSAGE,
    ]


def any_call_header(tokenizer: Tokenizer) -> list[int]:
    """The same up to where the function's name begins, its dot included in how names are tokenised."""
    return [CHANNEL, *tokenizer.encode("commentary to=functions")]


def _message(tokenizer: Tokenizer, limit: int, role: str, content: str, channel: str | None = None) -> list[int]:
    header = [CHANNEL, *tokenizer.encode(channel)] if channel else []
    return [START, *tokenizer.encode(role), *header, MESSAGE, *tokenizer.encode(content, limit), END]


def _begin(
    effort: str, today: datetime.date, tokenizer: Tokenizer, functions: Sequence[Function]
) -> tuple[list[int], str]:
    """The system message, which says whether there are functions, and the functions' description for the model."""
    system = SystemContent(
        reasoning_effort=ReasoningEffort(effort.capitalize()), conversation_start_date=today.isoformat()
    )
    message, encoding = Message.from_role_and_content(Role.SYSTEM, system), tokenizer.encoding
    if not functions:
        return encoding.render(message), ""
    try:
        described = DeveloperContent.new().with_function_tools(
            [ToolDescription.new(f.name, f.description, parameters=f.parameters) for f in functions]
        )
        both = [message, Message.from_role_and_content(Role.DEVELOPER, described)]
        ids = encoding.render_conversation(
            Conversation.from_messages(both), RenderConversationConfig(auto_drop_analysis=False)
        )
    except Exception as error:  # the library raises several kinds over a schema that is none
        raise ValueError(str(error)) from error
    end = ids.index(END) + 1
    text = encoding.decode(ids[end:])  # and back: whatever a description holds is text
    return ids[:end], text.partition("<|message|>")[2].removesuffix("<|end|>")


@dataclass(frozen=True)
class Segment:
    """The header of one generated message."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None  # a tool, where the message is a call
    content_type: str | None = None

    @property
    def kind(self) -> str:
        """Where its text goes: "content", "reasoning", "call", or "hidden" for what is not addressed to the user.

        A preamble (commentary without a recipient) is content: the format describes it as written for the user. So is
        text on an unknown channel or on none: the model said it, the client pays for it. A function is called on any
        channel. A message to another tool is hidden, and so is one that the model invents for another role.
        """
        if self.role == "assistant" and self.function:
            return "call"
        if self.role != "assistant" or self.recipient not in (None, "all", "user", "assistant"):
            return "hidden"
        return "reasoning" if self.channel == "analysis" else "content"

    @property
    def function(self) -> str:
        """The name of the function that is called; empty where none is."""
        recipient = self.recipient or ""
        return recipient.removeprefix(FUNCTIONS) if recipient.startswith(FUNCTIONS) else ""


class Event(NamedTuple):
    """Text of a message. `start` and `stop`: the generated tokens it comes from, counted from 0; equal where it is the
    rest of an earlier token."""

    segment: Segment
    text: str
    start: int
    stop: int


_CHANNELS = ("analysis", "commentary", "final")
_LIMIT = 128  # characters in one part of a header; a longer one is none
# The parts of a header: after <|start|>; where the role goes without saying; after <|channel|>; after <|constrain|>.
_STARTED = re.compile(
    r"(?P<role>assistant|user|system|developer|(?:functions|browser|python)[\w.-]*)?(?:\s+to=(?P<recipient>\S*))?"
)
_IMPLIED = re.compile(r"(?:assistant)?(?:\s*to=(?P<recipient>\S*))?")
_CHANNEL = re.compile(
    r"\s*(?P<channel>analysis|commentary|final|[\w-]*)(?:\s+to=(?P<recipient>\S*)(?:\s+(?P<content_type>\S+))?)?"
)
_CONSTRAIN = re.compile(r"\s*(?P<content_type>\S*)")
_UNKNOWN_CHANNEL = re.compile(r"[\w-]+(\s+(t|to|to=\S*( +\S*)?)?)?")


class Parser:
    """A state machine over generated token ids, begun behind the prompt's `<|start|>assistant`.

    It is either in a header or in the text of a message, and every token is allowed in both:
    - <|start|> and <|channel|> end the message in progress, if any, and continue in a header.
    - <|end|>, <|return|>, <|call|> and <|endoftext|> end it too; the header that follows needs no <|start|>.
    - <|message|> ends the header; in a text it is ignored, as are all other control tokens.
    - Text in a header that no header would contain is the text of a message whose <|message|> was left out.
    """

    def __init__(self, tokenizer: Tokenizer, begun: Iterable[int] = ()) -> None:
        """`begun`: tokens of the assistant's message that already stand in the prompt."""
        self._token_bytes = tokenizer.token_bytes
        self._position = 0
        self._segment: Segment | None = None  # None: in a header
        self._decoder = utf8_decoder()
        self._open_header(_IMPLIED)
        for token in begun:
            self.feed(token)
        self._position = 0

    @property
    def segment(self) -> Segment | None:
        """The message in progress; None in a header."""
        return self._segment

    def feed(self, token: int) -> Event | None:
        """The next generated token. An event may carry no text yet, where a character is incomplete."""
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
            self._open_header(_STARTED if token == START else _IMPLIED)
            return event
        if token == CHANNEL:
            event = None
            if self._segment:
                event = self.finish()
                self._open_header(_IMPLIED)
            self._next_part(_CHANNEL)
            return event
        if token == CONSTRAIN and not self._segment:
            self._next_part(_CONSTRAIN)
        return None

    def finish(self) -> Event | None:
        """What is left when no token follows: half a character, or a header that was none."""
        text = self._decoder.decode(b"", final=True)
        if self._segment:
            return Event(self._segment, text, self._position, self._position) if text else None
        self._text += text
        rest = self._read_header()
        if not rest.strip():
            return None
        return self._leave_header(rest, self._position)

    def _open_header(self, pattern: re.Pattern[str]) -> None:
        self._segment = None
        self._fields: dict[str, str] = {}
        self._text = ""
        self._next_part(pattern)

    def _next_part(self, pattern: re.Pattern[str]) -> None:
        self._decoder.reset()
        self._pattern, self._text = pattern, ""
        self._rest_from: int | None = None  # the token where text began that is no header's

    def _read_header(self) -> str:
        """Keep what the header's current part says; returns what follows that is not of a header."""
        match = self._pattern.match(self._text)
        found = {name: value for name, value in match.groupdict().items() if value}
        self._fields |= found
        unknown = self._pattern is _CHANNEL and found.get("channel", "final") not in _CHANNELS
        return self._text if unknown else self._text[match.end() :]

    def _header_text(self, text: str, position: int) -> Event | None:
        self._text += text
        rest = self._read_header()
        said = rest.strip()
        if not said:
            self._rest_from = None
        elif self._rest_from is None:
            self._rest_from = position
        if len(self._text) > _LIMIT:
            return self._leave_header(self._text, position + 1)
        # "to=".startswith: nothing beyond the header, or what may become its recipient.
        if "to=".startswith(said) or (
            rest == self._text and self._pattern is _CHANNEL and _UNKNOWN_CHANNEL.fullmatch(said)
        ):
            return None
        return self._leave_header(rest, position + 1)

    def _leave_header(self, rest: str, stop: int) -> Event:
        """`rest` is the beginning of a message. Where that is all of the part, the part named nothing."""
        if rest == self._text:
            for name in self._pattern.groupindex:
                self._fields.pop(name, None)
        self._segment = Segment(**self._fields)
        start = stop if self._rest_from is None else self._rest_from
        return Event(self._segment, rest, start, stop)


def parse(tokens: Iterable[int], tokenizer: Tokenizer) -> list[tuple[Segment, str]]:
    """All messages of a finished output, those without text left out."""
    parser = Parser(tokenizer)
    messages: list[tuple[Segment, str]] = []
    for event in [*map(parser.feed, tokens), parser.finish()]:
        if event and event.text:
            if messages and messages[-1][0] is event.segment:
                messages[-1] = (event.segment, messages[-1][1] + event.text)
            else:
                messages.append((event.segment, event.text))
    return messages
