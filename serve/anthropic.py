"""Anthropic's Messages API as a client writes it: request types with their ranges, and what they are to harmony.

Knows nothing of how a request is answered (`endpoints/messages`). Types and ranges are checked here and nowhere else.
The text of neighbouring blocks is joined by a blank line.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from serve.conversation import DEFAULT_EFFORT, unsealed
from serve.grammar import Grammar, Offer, chat_grammar, json_form
from serve.harmony import Call, Function, Turn
from serve.protocol import ApiError, ChatRequest, JsonObject, unsupported

# A `tool_use` block has an object as its input. Arguments that are none, since the model erred or was cut short, are
# told as the text of this field, and given back to the model as it wrote them.
INVALID_JSON = "INVALID_JSON"
# Claude Code's first block of the system prompt: it differs with every request, and would keep the prefix cache from
# ever finding a conversation.
_BILLING_HEADER = "x-anthropic-billing-header"
# The effort by the most tokens of reasoning that a client asks for; a larger budget is "high".
_BUDGETS = ((4096, "low"), (16384, "medium"))

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$(?!\n)")]

StopSequence = Annotated[str, Meta(min_length=1, max_length=256)]


class Block(msgspec.Struct, kw_only=True):
    """A part of a message, or of the system prompt."""

    cache_control: JsonObject | None = None  # without effect: every prefix is cached


class TextBlock(Block, tag_field="type", tag="text"):
    """Text."""

    text: str


class ImageBlock(Block, tag_field="type", tag="image"):
    """Refused."""


class DocumentBlock(Block, tag_field="type", tag="document"):
    """Refused."""


class ThinkingBlock(Block, tag_field="type", tag="thinking"):
    """Reasoning of the assistant, as the client got it."""

    thinking: str
    signature: str = ""

    @property
    def reasoning(self) -> str:
        """The text, also where it was left out of the reply and only the signature holds it."""
        return self.thinking or unsealed(self.signature)


class RedactedThinkingBlock(Block, tag_field="type", tag="redacted_thinking"):
    """Reasoning that only Anthropic's servers can read: accepted, and not told to the model."""

    data: str


class ToolUseBlock(Block, tag_field="type", tag="tool_use"):
    """A call of the assistant."""

    id: str
    name: ToolName
    input: JsonObject


class ToolResultBlock(Block, tag_field="type", tag="tool_result"):
    """The answer to a call."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None


AnyBlock: TypeAlias = (
    TextBlock | ImageBlock | DocumentBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
)


class Message(msgspec.Struct):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]

    @property
    def blocks(self) -> list[AnyBlock]:
        return [TextBlock(text=self.content)] if isinstance(self.content, str) else self.content


class Tool(msgspec.Struct):
    """A tool: a function, or by its type one that Anthropic defines, which is left out."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: JsonObject | None = None
    strict: bool | None = None  # the input of its calls is held to the schema
    cache_control: JsonObject | None = None  # this and the next without effect
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[JsonObject] | None = None
    allowed_callers: list[str] | None = None

    @property
    def is_function(self) -> bool:
        return self.type in (None, "custom")


class ToolChoice(msgspec.Struct):
    """Whether the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """How much the model reasons, and whether the client sees it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct):
    """The form of the answer's text."""

    type: Literal["json_schema"]
    schema: JsonObject


class OutputConfig(msgspec.Struct):
    """How much effort the answer is worth, and its form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens: what decides the prompt. null means: not given."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Meta(max_length=512)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @property
    def effort(self) -> str:
        """The reasoning effort: as `output_config` names it, or else by the budget of thinking."""
        if self.output_config and self.output_config.effort:
            return {"xhigh": "high", "max": "high"}.get(self.output_config.effort, self.output_config.effort)
        if self.thinking and self.thinking.type == "disabled":
            return "low"
        if budget := self.thinking and self.thinking.budget_tokens:
            return next((effort for most, effort in _BUDGETS if budget <= most), "high")
        return DEFAULT_EFFORT

    @property
    def choice(self) -> ToolChoice:
        return self.tool_choice or ToolChoice("auto")

    @property
    def functions(self) -> list[Function]:
        """What the model is offered. Raises ApiError 400 for tools and a choice of them that do not fit together."""
        functions = []
        for position, tool in enumerate(self.tools or []):
            field = f"tools[{position}]"
            if tool.is_function:
                try:
                    name = msgspec.convert(tool.name, ToolName)
                except msgspec.ValidationError as error:
                    raise ApiError(400, f"{field}.name: {error}", f"{field}.name") from None
                if tool.input_schema is None:
                    raise ApiError(400, f"{field}.input_schema is needed: a JSON schema", f"{field}.input_schema")
                functions.append(Function(name, tool.description or "", tool.input_schema))
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            raise ApiError(400, "two tools have the same name", "tools")
        if self.choice.type == "tool" and self.choice.name not in names:
            raise ApiError(400, f"tool_choice names {self.choice.name!r}, which is not among tools", "tool_choice")
        if self.choice.type == "any" and not names:
            raise ApiError(400, "tool_choice any needs tools", "tool_choice")
        return [] if self.choice.type == "none" else functions

    def grammar(self, continues: bool) -> Grammar | None:
        """What the answer is held to; None: anything. `continues`: it goes on with a text. Raises ApiError 400."""
        place = "output_config.format"
        output_format = self.output_config.format if self.output_config else None
        if continues:
            if output_format:
                raise ApiError(400, f"{place}: a last message of the assistant with text forbids it", place)
            return None
        form = json_form(output_format.schema, f"{place}.schema") if output_format else None
        offers = [
            Offer(tool.name or "", tool.input_schema, bool(tool.strict), f"tools[{i}].input_schema")
            for i, tool in enumerate(self.tools or [])
            if tool.is_function and self.choice.type != "none"
        ]
        demanded = [offer.name for offer in offers] if self.choice.type == "any" else []
        if self.choice.type == "tool" and self.choice.name:
            demanded = [self.choice.name]
        return chat_grammar(form, offers, demanded)

    @property
    def ignored(self) -> set[str]:
        """Names of what has no effect, besides the fields that nobody here knows."""
        names = set()
        for tool in self.tools or []:
            if not tool.is_function:
                names.add(f"tools.{tool.type}")
                continue
            for name in tool.__struct_fields__[5:]:
                if getattr(tool, name) not in (None, False, []):
                    names.add(f"tools.{name}")
        system = self.system if isinstance(self.system, list) else []
        if any(is_billing_header(block.text) for block in system):
            names.add(f"system.{_BILLING_HEADER}")
        if any(block.cache_control for block in system):
            names.add("system.cache_control")
        if any(block.cache_control for message in self.messages for block in message.blocks):
            names.add("messages.content.cache_control")
        return names

    @property
    def call_ids(self) -> list[str]:
        """Of the calls in the conversation."""
        blocks = (block for message in self.messages for block in message.blocks)
        return [block.id for block in blocks if isinstance(block, ToolUseBlock)]

    def turns(self, reasoning_before: Mapping[str, str]) -> list[Turn]:
        """The conversation as harmony takes it.

        `reasoning_before[id of a call]` is what the model reasoned before it and the client was not shown, if any.
        Raises ApiError 400 for a block that is not text or does not belong to its role, and for the answer to a call
        that no earlier message contains.
        """
        system = [TextBlock(text=self.system)] if isinstance(self.system, str) else self.system or []
        texts = [block.text for block in system if block.text and not is_billing_header(block.text)]
        turns = [Turn("system", "\n\n".join(texts))] if texts else []
        function_names: dict[str, str] = {}  # by id of the call
        for position, message in enumerate(self.messages):
            field = f"messages[{position}].content"
            if message.role == "assistant":
                turns += _assistant_turns(message, field, function_names, reasoning_before)
            else:
                turns += _other_turns(message, field, function_names)
        return turns


class MessagesRequest(CountRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    stop_sequences: Annotated[list[StopSequence], Meta(max_length=16)] | None = None
    stream: bool | None = None
    service_tier: Literal["auto", "standard_only"] | None = None  # there is one tier
    thread: JsonObject | None = None  # refused: a server that ignored it would answer without what was said before

    @property
    def shows_thinking(self) -> bool:
        """Whether the reply has blocks of thinking: clients that do not ask for them do not expect any."""
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def seals_thinking(self) -> bool:
        """Whether the reply holds reasoning only in signatures."""
        return bool(self.thinking and self.thinking.display == "omitted")

    def sampling(self, most: int) -> ChatRequest:
        """The sampling parameters, under their names in the chat endpoint; at most `most` tokens."""
        return ChatRequest(
            messages=[], max_tokens=most, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k
        )


def is_billing_header(text: str) -> bool:
    """Whether a block of the system prompt is left out."""
    return text.startswith(_BILLING_HEADER)


def _assistant_turns(
    message: Message, field: str, function_names: dict[str, str], reasoning_before: Mapping[str, str]
) -> list[Turn]:
    """A message of the assistant as turns of reasoning, text and calls in this order: one, unless a call is followed
    by text or reasoning. Notes the calls in `function_names`."""
    turns: list[Turn] = []
    reasoning: list[str] = []
    texts: list[str] = []
    calls: list[Call] = []

    def end_turn() -> None:
        if reasoning or texts or calls:
            turns.append(Turn("assistant", "\n\n".join(texts), "\n\n".join(reasoning), tuple(calls)))
        for parts in (reasoning, texts, calls):
            parts.clear()

    for block in message.blocks:
        if calls and not isinstance(block, ToolUseBlock):
            end_turn()
        match block:
            case TextBlock():
                texts += [block.text] if block.text else []
            case ThinkingBlock():
                reasoning += [block.reasoning] if block.reasoning else []
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock():
                # A call that is sent twice has its reasoning once: what a request recalls is bounded by what is kept.
                if block.id not in function_names and (kept := reasoning_before.get(block.id)):
                    if calls:
                        end_turn()
                    reasoning.append(kept)
                calls.append(Call(block.name, _arguments(block, field)))
                function_names[block.id] = block.name
            case _:
                raise _misplaced(block, message.role, field)
    end_turn()
    return turns


def _arguments(block: ToolUseBlock, field: str) -> str:
    """The arguments of a call as the model wrote them, or nearly."""
    raw = block.input.get(INVALID_JSON)
    if isinstance(raw, str) and len(block.input) == 1:
        return raw
    try:
        return msgspec.json.encode(block.input).decode()
    except RecursionError:
        raise ApiError(400, f"{field}: the input of {block.name} is nested too deeply", field) from None


def _other_turns(message: Message, field: str, function_names: dict[str, str]) -> Iterator[Turn]:
    """A message of another role: a turn for each run of text, and for each answer to a call."""
    texts: list[str] = []
    answered = False
    for block in message.blocks:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolResultBlock() if message.role == "user":
                if texts:
                    yield Turn(message.role, "\n\n".join(texts))
                    texts = []
                name = function_names.get(block.tool_use_id)
                if name is None:
                    raise ApiError(
                        400, f"tool_use_id {block.tool_use_id!r} is not the id of a call in an earlier message", field
                    )
                answered = True
                yield Turn("tool", _result(block, field), name=name)
            case _:
                raise _misplaced(block, message.role, field)
    if texts or not answered:
        yield Turn(message.role, "\n\n".join(texts))


def _result(block: ToolResultBlock, field: str) -> str:
    """What the model is told of an answer; that it is an error, in a word."""
    parts = [TextBlock(text=block.content)] if isinstance(block.content, str) else block.content or []
    texts = []
    for part in parts:
        if not isinstance(part, TextBlock):
            raise _misplaced(part, "user", field)
        texts.append(part.text)
    return ("Error: " if block.is_error else "") + "\n\n".join(texts)


def _misplaced(block: AnyBlock, role: str, field: str) -> ApiError:
    """The answer to a block that its message cannot have."""
    kind = block.__struct_config__.tag
    if isinstance(block, ImageBlock | DocumentBlock):
        return unsupported(f"content blocks of type {kind!r} are not supported: the model reads text only", field)
    return ApiError(400, f"a message of the role {role} cannot have a block of type {kind!r}", field)
