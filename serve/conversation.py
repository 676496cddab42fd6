"""A client's messages and tools to the token ids of a harmony prompt, for every endpoint that takes messages."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import replace

from conf.limits import CHANNEL, MESSAGE
from engine.tokenizer import Tokenizer
from serve.generation import Serving
from serve.harmony import Call, Function, Turn, any_call_header, call_header, render
from serve.protocol import ApiError, ChatMessage, ChatRequest, NamedTool, Tool, unsupported
from serve.schema import SchemaError

DEFAULT_EFFORT = "medium"
_SCHEMA = ".function.parameters"  # of a tool in a chat request
_SEALED = "sealed:"  # before reasoning that a client keeps without reading it


def chat_prompt(serving: Serving, turns: list[Turn], tools: list[Tool] | None, effort: str) -> list[int]:
    """The prompt of a conversation. Encoding stops soon after the context's length. Raises ApiError 400."""
    functions = [
        Function(tool.function.name, tool.function.description or "", tool.function.parameters) for tool in tools or []
    ]
    return rendered(serving, turns, functions, effort, serving.ready.max_context)


def rendered(
    serving: Serving, turns: list[Turn], functions: list[Function], effort: str, limit: int, places: Sequence[str] = ()
) -> list[int]:
    """The prompt of `turns`. Encoding stops soon after `limit` tokens.

    `places`: where the schema of each function stands in the request, if not where it stands in a chat request. Raises
    ApiError 400 for functions that cannot be described.
    """
    try:
        return render(turns, effort, serving.today, serving.tokenizer, limit, functions)
    except SchemaError as error:
        function, _, inner = error.place.partition(_SCHEMA)
        place = places[int(function.strip("tols[]"))] + inner if places else error.place
        message = f"the tools cannot be described to the model: {place}: {error.problem}"
        raise ApiError(400, message, place) from None


def prefilled_call(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """The header of the call that `tool_choice` demands, to put at the prompt's end: the model must go on with it."""
    if isinstance(request.tool_choice, NamedTool):
        return call_header(tokenizer, request.tool_choice.function.name)
    if request.tool_choice == "required" and request.tools:
        return demanded_call(tokenizer, [tool.function.name for tool in request.tools])
    return []


def demanded_call(tokenizer: Tokenizer, names: Sequence[str]) -> list[int]:
    """The header of a call of one of these functions, as far as the choice among them leaves it open."""
    return call_header(tokenizer, names[0]) if len(names) == 1 else any_call_header(tokenizer)


def sealed(reasoning: str) -> str:
    """The reasoning as clients send it back unread. They may also write it in plain: this is no secret."""
    return _SEALED + base64.b64encode(reasoning.encode()).decode()


def unsealed(text: str) -> str:
    """The reasoning that was sealed; empty for what another server made."""
    try:
        return base64.b64decode(text.removeprefix(_SEALED)).decode() if text.startswith(_SEALED) else ""
    except (binascii.Error, ValueError):
        return ""


def continued(turns: list[Turn], tokenizer: Tokenizer, limit: int) -> tuple[list[Turn], list[int]]:
    """The answer is to go on with the text of the last turn, an assistant's: the turns without that text, and its
    tokens with their header, to put at the prompt's end. Encoding stops soon after `limit` tokens."""
    *earlier, last = turns
    text = tokenizer.encode(last.content, limit)
    return [*earlier, replace(last, content="")], [CHANNEL, *tokenizer.encode("final"), MESSAGE, *text]


def conversation_turns(messages: list[ChatMessage]) -> list[Turn]:
    """Messages as harmony takes them; an assistant's message may be empty, as an answer that was cut short is.

    Raises ApiError 400 for content that is not text, and for the answer to a call that no earlier message contains.
    """
    function_names: dict[str, str] = {}  # by id of the call
    turns = []
    for position, message in enumerate(messages):
        field = f"messages[{position}]"
        content = _text(message, field)
        calls = message.tool_calls or []
        reasoning = message.reasoning_content or message.reasoning or ""
        if message.function_call is not None:
            raise unsupported("function_call is not supported: use tool_calls", f"{field}.function_call")
        if calls and message.role != "assistant":
            raise ApiError(400, f"a message of the role {message.role} cannot have tool_calls", f"{field}.tool_calls")
        if content is None and message.role != "assistant":
            raise ApiError(400, f"a message of the role {message.role} needs content", f"{field}.content")
        name = ""
        if message.role == "tool":
            name = function_names.get(message.tool_call_id or "", "")
            if not name:
                raise ApiError(
                    400,
                    f"tool_call_id {message.tool_call_id!r} is not the id of a call in an earlier message",
                    f"{field}.tool_call_id",
                )
        function_names |= {call.id: call.function.name for call in calls}
        harmony_calls = tuple(Call(call.function.name, call.function.arguments) for call in calls)
        turns.append(Turn(message.role, content or "", reasoning, harmony_calls, name))
    return turns


def _text(message: ChatMessage, field: str) -> str | None:
    """The message's content. Raises ApiError 400 for a part of it that is not text."""
    if message.content is None or isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise unsupported(f"content parts of type {part.type!r} are not supported: text only", f"{field}.content")
        texts.append(part.text)
    return "".join(texts)
