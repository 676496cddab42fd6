"""A JSON body to a request: which fields are refused, ignored or accepted, and other forms of the same request.

Knows field names and values; types and ranges are those of the request types in `protocol`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec
from msgspec import inspect

from serve.protocol import (
    ApiError,
    ChatMessage,
    ContentPart,
    FunctionDefinition,
    JsonSchema,
    ReasoningOptions,
    ResponseFormat,
    SamplingRequest,
    StreamOptions,
    StructuredOutputs,
    TemplateArguments,
    TokenizeRequest,
    Tool,
    unsupported,
)

# Parameters of this API, or of servers that speak it, which change the answer and which this server does not have: only
# the values that change nothing are accepted.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("audio", "prediction", "web_search_options", "prompt_logprobs", "prompt_embeds"), (None,)),
    **dict.fromkeys(("cache_salt", "truncate_prompt_tokens", "allowed_token_ids", "structured_outputs"), (None,)),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template"), (None,)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output"), (None, False)),
    "continue_final_message": (None, False),
    **dict.fromkeys(("spaces_between_special_tokens", "add_generation_prompt"), (None, True)),
    "bad_words": (None, []),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "length_penalty": (None, 1),
}
# Deprecated by OpenAI: refused, with what to send instead.
LEGACY = {"functions": "tools", "function_call": "tool_choice"}
# Wishes that this server does not act on, beside the values that wish for nothing: the others are named as ignored,
# unless the request type has the field.
WISHES: dict[str, tuple[object, ...]] = {
    "store": (None, False),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
    "priority": (None, 0),
}
# Change nothing here whatever their value is.
ACCEPTED = {"best_of", "user", "metadata", "prompt_cache_key", "safety_identifier", "add_special_tokens"}
ACCEPTED |= {"client_metadata", "prompt_cache_retention"}
IGNORED_HEADER = "x-ignored-parameters"  # of a response: the fields of the request that this server does not know
# Fields whose values are objects: their unknown fields are named too.
NESTED: dict[str, type[msgspec.Struct]] = {
    "messages": ChatMessage,
    "messages.content": ContentPart,
    "stream_options": StreamOptions,
    "chat_template_kwargs": TemplateArguments,
    "reasoning": ReasoningOptions,
    "response_format": ResponseFormat,
    "response_format.json_schema": JsonSchema,
    "structured_outputs": StructuredOutputs,
    "tools": Tool,
    "tools.function": FunctionDefinition,
}

# Requests in the forms of OpenAI's API; other APIs have forms of their own.
OPENAI = (SamplingRequest, TokenizeRequest)
BOM = b"\xef\xbb\xbf"

Request = TypeVar("Request", bound=msgspec.Struct)


def parse(body: bytes, kind: type[Request]) -> tuple[Request, dict[str, str]]:
    """A JSON body -> the request, and the response header that names the ignored fields (empty where there are none).

    Raises ApiError 400 naming the field.
    """
    try:
        raw = msgspec.json.decode(body.removeprefix(BOM))
        ignored: set[str] = set()
        if isinstance(raw, dict):
            raw = {name: _whole_numbers(value) for name, value in raw.items()}
            _refuse_unsupported(raw, kind)
            ignored = _unknown_fields(raw, kind)
            if issubclass(kind, OPENAI):
                raw = normalise(raw, ignored)
        request = msgspec.convert(raw, kind, str_keys=True)
    except RecursionError:
        raise ApiError(400, "the JSON body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _does_not_fit(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    return request, ignored_header(ignored)


def parse_query(query: Mapping[str, str], kind: type[Request]) -> Request:
    """The query of a URL -> the request; parameters that `kind` does not know change nothing.

    Raises ApiError 400 naming the parameter.
    """
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _does_not_fit(error, kind) from None


def _does_not_fit(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> ApiError:
    """The answer to what is no `kind`."""
    message = str(error)
    path = re.search(r"\$\.([^`]*)`", message)
    missing = re.search(r"required field `(\w+)`", message)
    param = ".".join(match[1].replace("[...]", "") for match in (path, missing) if match)
    if path and message.startswith("Invalid enum value"):
        message += allowed_values(kind, path[1])
    return ApiError(400, message.replace("$.", ""), param or None)


def ignored_header(fields: Iterable[str]) -> dict[str, str]:
    """The response header that names ignored fields; empty where there are none."""
    # A client chooses these names: no control characters and no endless header.
    names = [re.sub(r"[^\w.-]", "?", name[:64], flags=re.ASCII) for name in sorted(fields)[:20]]
    return {IGNORED_HEADER: ", ".join(names)} if names else {}


def normalise(raw: dict[str, object], ignored: set[str]) -> dict[str, object]:
    """What clients send in another form, in the form of the request types; adds to `ignored` what has no effect.

    Raises ApiError 400 for a tool choice among tools that are not there.
    """
    raw = dict(raw)
    for name in ("max_tokens", "max_completion_tokens"):
        if raw.get(name) == -1:  # as many as the context holds
            raw[name] = None
    if raw.get("model") == "":
        raw["model"] = None
    if raw.get("stream_options") is not None and raw.get("stream") in (None, False):
        ignored.add("stream_options")
    tools = raw.get("tools")
    if isinstance(tools, list):
        kept = [tool for tool in tools if not (isinstance(tool, dict) and tool.get("type") == "custom")]
        if len(kept) < len(tools):
            ignored.add("tools.custom")
        raw["tools"] = tools = kept
    choice = raw.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        raw["tools"], raw["tool_choice"] = _allowed_tools(choice, tools if isinstance(tools, list) else [])
    return raw


def _allowed_tools(choice: dict[str, object], tools: list[object]) -> tuple[list[object], object]:
    """The tools that a choice of the type allowed_tools leaves, and its mode. Raises ApiError 400."""
    group = choice.get("allowed_tools")
    group_tools = group.get("tools") if isinstance(group, dict) else None
    names = {_function_name(tool) for tool in group_tools} if isinstance(group_tools, list) else {None}
    if not isinstance(group, dict) or None in names:
        raise ApiError(400, "expected {mode, tools} with functions by name", "tool_choice.allowed_tools")
    missing = names - {_function_name(tool) for tool in tools}
    if missing:
        raise ApiError(400, f"tool_choice allows {min(map(str, missing))!r}, which is not among tools", "tool_choice")
    if group.get("mode") not in ("auto", "required"):
        raise ApiError(400, f"mode: got {group.get('mode')!r}, allowed: auto, required", "tool_choice.allowed_tools")
    return [tool for tool in tools if _function_name(tool) in names], group["mode"]


def _function_name(tool: object) -> str | None:
    """The name of a tool of the type function; None for anything else."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def allowed_values(kind: type[msgspec.Struct], path: str) -> str:
    """`, allowed: …` for the field at msgspec's `path` in `kind`; empty where it has no list of values."""
    current: list[inspect.Type] = [inspect.type_info(kind)]
    for name in re.sub(r"\[[^]]*\]", "", path).split("."):
        current = [
            field.type
            for entry in _members(current)
            if isinstance(entry, inspect.StructType)
            for field in entry.fields
            if field.encode_name == name
        ]
    values = [str(v) for entry in _members(current) if isinstance(entry, inspect.LiteralType) for v in entry.values]
    return f", allowed: {', '.join(values)}" if values else ""


def _members(types: list[inspect.Type]) -> list[inspect.Type]:
    """The types with those of their unions and lists."""
    found: list[inspect.Type] = []
    for entry in types:
        if isinstance(entry, inspect.UnionType):
            found += _members(list(entry.types))
        elif isinstance(entry, inspect.ListType):
            found += _members([entry.item_type])
        elif isinstance(entry, inspect.Metadata):
            found += _members([entry.type])
        else:
            found.append(entry)
    return found


def _whole_numbers(value: object) -> object:
    """A number without a fraction as an integer, since some clients write 4.0 for 4; in an object also its members.

    What stands deeper, like the schemas of tools and the arguments of calls, is the user's own and stays as it is.
    """
    if isinstance(value, dict):
        return {name: _whole_numbers(member) if isinstance(member, float) else member for name, member in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_unsupported(raw: dict[str, object], kind: type[msgspec.Struct]) -> None:
    for name, instead in LEGACY.items():
        if raw.get(name) not in (None, [], "none") and name not in kind.__struct_fields__:
            raise unsupported(f"{name} is deprecated and not supported: use {instead}", name)
    for name, neutral in NEUTRAL.items():
        if name in raw and raw[name] not in neutral and name not in kind.__struct_fields__:
            raise unsupported(f"{name} is not supported by this server", name)
    if raw.get("best_of") not in (None, raw.get("n") or 1):
        raise unsupported("best_of is supported only where it equals n", "best_of")


def _unknown_fields(raw: dict[str, object], kind: type[msgspec.Struct]) -> set[str]:
    """The fields that have no effect because this server does not know them, as `name` or `messages.name`."""
    unknown = raw.keys() - set(kind.__struct_fields__) - NEUTRAL.keys() - LEGACY.keys() - WISHES.keys() - ACCEPTED
    wishes = (WISHES.keys() & raw.keys()) - set(kind.__struct_fields__)
    unknown |= {name for name in wishes if raw[name] not in WISHES[name]}
    for field, inner in NESTED.items():
        if not issubclass(kind, OPENAI) or field.split(".")[0] not in kind.__struct_fields__:
            continue  # named as a whole
        for entry in _entries(raw, field.split(".")):
            if isinstance(entry, dict):
                # Clients send an assistant's message back as they got it, with fields that hold nothing.
                names = entry.keys() - set(inner.__struct_fields__)
                unknown |= {f"{field}.{name}" for name in names if entry[name] not in (None, [])}
    return unknown


def _entries(raw: object, path: list[str]) -> list[object]:
    """The values at `path`, through lists."""
    entries = [raw]
    for name in path:
        values = [entry.get(name) for entry in entries if isinstance(entry, dict)]
        entries = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return entries
