"""OpenAI's Responses API as a client writes it: request types with their ranges, and what they are to harmony.

Knows nothing of how a request is answered (`endpoints/responses`). Types and ranges are checked here and nowhere else.
Every item of the conversation is a turn of its own, so that the model reads its own messages in the order in which it
wrote them.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from serve.conversation import DEFAULT_EFFORT, unsealed
from serve.grammar import Grammar, Offer, chat_grammar, response_form
from serve.harmony import Call, Function, Turn
from serve.protocol import (
    EFFORTS,
    ApiError,
    ChatRequest,
    Effort,
    JsonObject,
    JsonSchema,
    Penalty,
    ResponseFormat,
    TopLogprobs,
    unsupported,
)

# A custom tool takes any text: to the model it is a function with this one parameter.
INPUT = "input"
_INPUT_SCHEMA: JsonObject = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}
_CALLS = ("function_call", "custom_tool_call")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
Value = TypeVar("Value")
REFERENCE = "item_reference"  # to an item of an answer that is kept
ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$(?!\n)")]
Include = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class Part(msgspec.Struct, omit_defaults=True):
    """A piece of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, omit_defaults=True):
    """An item of the conversation: a message, reasoning, a call, or the answer to one. Each has some of the fields."""

    type: str | None = None  # without one it is a message, or a reference
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: ToolName | None = None
    namespace: ToolName | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[Part] | None = None

    @property
    def kind(self) -> str:
        is_reference = self.id is not None and self.role is None
        return self.type or (REFERENCE if is_reference else "message")

    @property
    def reasoning(self) -> str:
        """The text of a reasoning item, in plain or sealed."""
        parts = self.content if isinstance(self.content, list) else []
        return "".join(part.text or "" for part in parts) or unsealed(self.encrypted_content or "")


def listed(items: Sequence[Item]) -> list[JsonObject]:
    """The items of a conversation as the API lists them; those that came without an id are named by their position."""
    return [_listed(item, item.id or f"item_{position}") for position, item in enumerate(items)]


def _listed(item: Item, id: str) -> JsonObject:
    told: JsonObject = msgspec.to_builtins(item) | {"id": id, "type": item.kind, "status": "completed"}
    if item.kind == "reasoning":
        return told | {"summary": []}
    if item.kind == "message":
        parts = [Part("text", item.content)] if isinstance(item.content, str) else item.content or []
        told["content"] = [_listed_part(part, item.role == "assistant") for part in parts]
    return told


def _listed_part(part: Part, is_answer: bool) -> JsonObject:
    if part.type == "refusal":
        return {"type": "refusal", "refusal": part.refusal}
    if is_answer:
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": part.text}


class Page(msgspec.Struct):
    """Which of the items in a list a client wants: the query of a GET."""

    after: str | None = None  # the id of an item: those that follow it
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"

    def of(self, items: list[JsonObject]) -> JsonObject:
        """The page as the API writes it. Raises ApiError 400 where there is no such item."""
        items = items if self.order == "asc" else items[::-1]
        if self.after is not None:
            positions = [position for position, item in enumerate(items) if item["id"] == self.after]
            if not positions:
                raise ApiError(400, f"after: there is no item {self.after!r}", "after")
            items = items[positions[-1] + 1 :]
        page = items[: self.limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        has_more = len(items) > len(page)
        return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": has_more}


class CustomFormat(msgspec.Struct, omit_defaults=True):
    """What a custom tool takes: any text, or what a grammar allows, which is told to the model."""

    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class Tool(msgspec.Struct):
    """A tool: a function, a custom tool, or a namespace of these. Those of other types are left out."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    format: CustomFormat | None = None
    tools: "list[Tool] | None" = None
    strict: bool | None = None  # the arguments of its calls are held to the schema
    defer_loading: bool | None = None  # without effect


Tools = Annotated[list[Tool], Meta(max_length=512)]


class Offered(NamedTuple):
    """What the name that the model calls stands for."""

    function: Function
    is_custom: bool
    name: str
    namespace: str | None
    place: str  # of its schema in the request
    is_strict: bool


class ToolReference(msgspec.Struct, omit_defaults=True):
    """A tool named by a tool choice."""

    type: str
    name: str | None = None


class ToolChoice(msgspec.Struct, omit_defaults=True):
    """A tool choice that demands a call of one tool, or allows some of them."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ToolReference] | None = None


class Reasoning(msgspec.Struct):
    """How much the model reasons. Summaries are not made: the text itself is in the reply."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(JsonSchema, kw_only=True, omit_defaults=True):
    """The form of the answer: text, json_object, or json_schema with the fields of a JsonSchema."""

    type: Literal["text", "json_object", "json_schema"]

    @property
    def response_format(self) -> ResponseFormat:
        """The same as the chat endpoint names it."""
        given = JsonSchema(name=self.name, schema=self.schema, strict=self.strict)
        return ResponseFormat(self.type, given if self.type == "json_schema" else None)


class TextOptions(msgspec.Struct):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(msgspec.Struct):
    """How a reply is streamed: never obfuscated."""

    include_obfuscation: bool | None = None


class Sampling(ChatRequest, kw_only=True):
    """The sampling parameters under their names in the chat endpoint."""

    prompt_field: ClassVar[str] = "input"


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses. null means: not given."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[Include] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None  # of tools that a server runs: here none
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: (
        Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
        | None
    ) = None
    truncation: Literal["auto", "disabled"] | None = None  # a prompt that does not fit is refused, not cut
    prompt_cache_key: str | None = None  # every prefix is cached
    safety_identifier: str | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    background: bool | None = None
    conversation: str | JsonObject | None = None
    prompt: JsonObject | None = None

    @property
    def items(self) -> list[Item]:
        return [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def effort(self) -> str:
        return EFFORTS[self.reasoning.effort] if self.reasoning and self.reasoning.effort else DEFAULT_EFFORT

    @property
    def text_format(self) -> TextFormat:
        return (self.text.format if self.text else None) or TextFormat(type="text")

    @property
    def seals_reasoning(self) -> bool:
        return ENCRYPTED in (self.include or [])

    def check(self) -> None:
        """Raises ApiError 400 for what this server cannot do."""
        if self.background:
            raise unsupported("background: got true, allowed: false", "background")
        if self.conversation is not None:
            raise unsupported("conversation is not supported: use previous_response_id", "conversation")
        if self.prompt is not None:
            raise unsupported("prompt is not supported: use instructions and input", "prompt")

    def grammar(self, offered: dict[str, Offered]) -> Grammar | None:
        """What the answer is held to; None: anything. Raises ApiError 400."""
        form = response_form(self.text_format.response_format, "text.format", "text.format.schema")
        offers = [Offer(name, tool.function.parameters, tool.is_strict, tool.place) for name, tool in offered.items()]
        return chat_grammar(form, offers, self.demanded(offered))

    def sampling(self, room: int) -> Sampling:
        """The sampling parameters; at most `room` tokens, which the context has left."""
        most = None if self.max_output_tokens is None else max(1, min(self.max_output_tokens, room))
        logprobs = bool(self.top_logprobs) or LOGPROBS in (self.include or [])
        return Sampling(
            messages=[],
            max_tokens=most,
            temperature=self.temperature,
            top_p=self.top_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=logprobs,
            top_logprobs=self.top_logprobs,
        )

    def offered(self) -> dict[str, Offered]:
        """What the model may call, by the name it uses.

        A tool in a namespace is called `namespace.name`. Raises ApiError 400 for tools and a choice of them that do
        not fit together.
        """
        offered: dict[str, Offered] = {}
        for position, tool in enumerate(self.tools or []):
            field = f"tools[{position}]"
            if tool.type == "namespace":
                namespace = _name(tool, field)
                about = tool.description
                for inner_position, inner in enumerate(tool.tools or []):
                    if inner.type in ("function", "custom"):
                        _offer(offered, inner, f"{field}.tools[{inner_position}]", namespace, about)
                        about = None
            elif tool.type in ("function", "custom"):
                _offer(offered, tool, field)
        if self.tool_choice == "none":
            return {}
        if self.tool_choice == "required" and not offered:
            raise ApiError(400, "tool_choice required needs tools of type function or custom", "tool_choice")
        if not isinstance(self.tool_choice, ToolChoice):
            return offered
        allowed = self._chosen(self.tool_choice, offered)
        return {name: offered[name] for name in offered if name in allowed}

    def demanded(self, offered: dict[str, Offered]) -> list[str]:
        """Those of what is offered of which the model must call one; none where it need not call."""
        choice = self.tool_choice
        if isinstance(choice, ToolChoice):
            if choice.type == "allowed_tools":
                return list(offered) if choice.mode == "required" else []
            return [choice.name] if choice.name else []
        return list(offered) if choice == "required" else []

    def ignored(self, is_stored: bool) -> set[str]:
        """Names of what has no effect, besides the fields that nobody here knows."""
        names = {f"include.{name}" for name in self.include or [] if name not in (ENCRYPTED, LOGPROBS)}
        for tool in self.tools or []:
            if tool.type not in ("function", "custom", "namespace"):
                names.add(f"tools.{tool.type}")
                continue
            for inner in (tool, *(tool.tools or [])):
                names |= {"tools.defer_loading"} if inner.defer_loading else set()
                if inner.format and inner.format.type == "grammar":
                    names.add("tools.format")
            names |= {
                f"tools.namespace.{inner.type}"
                for inner in tool.tools or []
                if inner.type not in ("function", "custom")
            }
        if self.reasoning:
            names |= {f"reasoning.{name}" for name in ("summary", "generate_summary") if getattr(self.reasoning, name)}
        if any(item.kind == "reasoning" and item.encrypted_content and not item.reasoning for item in self.items):
            names.add("input.encrypted_content")
        if self.text and self.text.verbosity not in (None, "medium"):
            names.add("text.verbosity")
        if self.truncation == "auto":
            names.add("truncation")
        if self.max_tool_calls is not None:
            names.add("max_tool_calls")
        if self.stream_options and self.stream_options.include_obfuscation:
            names.add("stream_options.include_obfuscation")
        if self.store and not is_stored:
            names.add("store")
        return names

    def echo(self) -> JsonObject:
        """The fields of a response that say how it was asked for."""
        tools = [_told(tool) for tool in self.tools or [] if tool.type in ("function", "custom", "namespace")]
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {
                "effort": (self.reasoning.effort if self.reasoning else None) or DEFAULT_EFFORT,
                "summary": None,
            },
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": self.text_format, "verbosity": "medium"},
            "tool_choice": self.tool_choice or "auto",
            "tools": tools,
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "truncation": "disabled",
            "background": False,
        }

    def turns(self, items: Sequence[Item], earlier: int) -> list[Turn]:
        """The conversation as harmony takes it; the first `earlier` items are those of answers before this request.

        A message of the assistant that does not say its phase is a preamble where a call follows it. Raises ApiError
        400 for an item that is not text or does not belong here, and for the answer to a call that no earlier item is.
        """
        if not items:
            raise ApiError(400, "input: got no item, at least one is needed", "input")
        turns = [Turn("system", self.instructions)] if self.instructions else []
        function_names: dict[str, str] = {}  # by id of the call
        before_call = _before_call(items)
        for position, item in enumerate(items):
            turns.append(_turn(item, f"input[{position - earlier}]", function_names, position in before_call))
        return turns

    @staticmethod
    def _chosen(choice: ToolChoice, offered: dict[str, Offered]) -> set[str]:
        """The names that a tool choice leaves. Raises ApiError 400."""
        if choice.type == "allowed_tools":
            if choice.mode is None or choice.tools is None:
                raise ApiError(400, "tool_choice allowed_tools needs mode and tools", "tool_choice")
            names = {tool.name or "" for tool in choice.tools if tool.type in ("function", "custom")}
        elif choice.type in ("function", "custom"):
            names = {choice.name or ""}
        else:
            raise unsupported(
                f"tool_choice of type {choice.type!r} is not supported, allowed: function, custom, allowed_tools",
                "tool_choice",
            )
        if missing := names - offered.keys():
            raise ApiError(400, f"tool_choice names {min(missing)!r}, which is not among tools", "tool_choice")
        if choice.mode == "required" and not names:
            raise ApiError(400, "tool_choice required needs tools of type function or custom", "tool_choice")
        return names if choice.type == "allowed_tools" else set(offered)


def custom_input(arguments: str) -> str:
    """The text for a custom tool: the model's one argument, or all that it wrote where that is something else."""
    try:
        given = msgspec.json.decode(arguments, type=dict[str, str])
    except (msgspec.MsgspecError, RecursionError):
        return arguments
    return given[INPUT] if given.keys() == {INPUT} else arguments


def _name(tool: Tool, field: str) -> str:
    """Raises ApiError 400."""
    try:
        return msgspec.convert(tool.name, ToolName)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"{field}.name: {error}", f"{field}.name") from None


def _offer(
    offered: dict[str, Offered], tool: Tool, field: str, namespace: str | None = None, about: str | None = None
) -> None:
    """Add a function or custom tool. `about`: what is to be told of its namespace. Raises ApiError 400."""
    name = _name(tool, field)
    full_name = _full_name(namespace, name)
    if full_name in offered:
        raise ApiError(400, f"two tools have the same name, {full_name!r}", "tools")
    if len(full_name) > 128:
        raise ApiError(400, f"{field}.name: with its namespace it has more than 128 characters", f"{field}.name")
    lines = [f"{namespace}: {about}"] if about else []
    lines += [tool.description] if tool.description else []
    is_custom = tool.type == "custom"
    if is_custom and tool.format and tool.format.definition:
        lines.append(f"The {INPUT} follows this grammar ({tool.format.syntax}):\n{tool.format.definition}")
    function = Function(full_name, "\n".join(lines), _INPUT_SCHEMA if is_custom else tool.parameters)
    offered[full_name] = Offered(function, is_custom, name, namespace, f"{field}.parameters", bool(tool.strict))


def _full_name(namespace: str | None, name: str) -> str:
    return f"{namespace}.{name}" if namespace else name


def _told(tool: Tool) -> JsonObject:
    """A tool as a response tells it."""
    told: JsonObject = {"type": tool.type, "name": tool.name, "description": tool.description}
    if tool.type == "function":
        return told | {"parameters": tool.parameters, "strict": bool(tool.strict)}
    if tool.type == "custom":
        return told | {"format": tool.format or CustomFormat("text")}
    inner = [_told(inner) for inner in tool.tools or [] if inner.type in ("function", "custom")]
    return told | {"description": tool.description or "", "tools": inner}


def _before_call(items: Sequence[Item]) -> set[int]:
    """Positions of the assistant's items after which, before anybody else speaks, a call comes."""
    positions: set[int] = set()
    call_follows = False
    for position in reversed(range(len(items))):
        item = items[position]
        if item.kind in _CALLS:
            call_follows = True
        elif item.kind != "reasoning" and item.role != "assistant":
            call_follows = False
        elif call_follows:
            positions.add(position)
    return positions


def _turn(item: Item, field: str, function_names: dict[str, str], before_call: bool) -> Turn:
    """One item; a call is noted in `function_names`. Raises ApiError 400."""
    if item.kind == "message":
        text = _text(item.content, f"{field}.content")
        role = _needed(item.role, f"{field}.role")
        is_preamble = role == "assistant" and (item.phase == "commentary" if item.phase else before_call)
        return Turn(role, text, preamble=is_preamble)
    if item.kind == "reasoning":
        return Turn("assistant", "", item.reasoning)
    if item.kind in _CALLS:
        name = _full_name(item.namespace, _needed(item.name, f"{field}.name"))
        function_names[_needed(item.call_id, f"{field}.call_id")] = name
        if item.kind == "function_call":
            arguments = _needed(item.arguments, f"{field}.arguments")
        else:
            arguments = msgspec.json.encode({INPUT: _needed(item.input, f"{field}.input")}).decode()
        return Turn("assistant", "", calls=(Call(name, arguments),))
    if item.kind in _OUTPUTS:
        called = function_names.get(_needed(item.call_id, f"{field}.call_id"))
        if called is None:
            raise ApiError(
                400, f"call_id {item.call_id!r} is not the id of a call in an earlier item", f"{field}.call_id"
            )
        return Turn("tool", _text(item.output, f"{field}.output"), name=called)
    allowed = ", ".join(("message", "reasoning", *_CALLS, *_OUTPUTS, REFERENCE))
    raise unsupported(f"items of type {item.kind!r} are not supported, allowed: {allowed}", f"{field}.type")


def _needed(value: Value | None, field: str) -> Value:
    """Raises ApiError 400 where an item lacks what its type needs."""
    if value is None:
        raise ApiError(400, f"{field} is needed", field)
    return value


def _text(content: str | list[Part] | None, field: str) -> str:
    """Raises ApiError 400 for a part that is not text, or where there is none."""
    if content is None or isinstance(content, str):
        return _needed(content, field)
    texts = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("input_text", "output_text", "text", "refusal") or text is None:
            raise unsupported(f"content parts of type {part.type!r} are not supported: text only", field)
        texts.append(text)
    return "".join(texts)
