"""A JSON body to a request: which fields are refused, ignored or accepted without effect.

Knows field names and values; types and ranges are those of the request types in `protocol`.
"""

import re
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from serve.protocol import ApiError, ChatMessage, StreamOptions, unsupported

# Parameters of this API, or of servers that speak it, which change the answer and which this server does not have: only
# the values that change nothing are accepted.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("audio", "prediction", "web_search_options", "prompt_logprobs", "prompt_embeds"), (None,)),
    **dict.fromkeys(("cache_salt", "truncate_prompt_tokens", "allowed_token_ids", "structured_outputs"), (None,)),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template"), (None,)),
    **dict.fromkeys(("store", "use_beam_search", "include_stop_str_in_output"), (None, False)),
    "continue_final_message": (None, False),
    **dict.fromkeys(("spaces_between_special_tokens", "add_generation_prompt"), (None, True)),
    **dict.fromkeys(("functions", "bad_words"), (None, [])),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "function_call": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
    "length_penalty": (None, 1),
    "chat_template_kwargs": (None, {}),
    "priority": (None, 0),
}
# Change nothing here whatever their value is.
ACCEPTED = {"best_of", "user", "metadata", "prompt_cache_key", "safety_identifier", "add_special_tokens"}
IGNORED_HEADER = "x-ignored-parameters"  # of a response: the fields of the request that this server does not know
# Fields whose values are objects: their unknown fields are named too.
NESTED: dict[str, type[msgspec.Struct]] = {"messages": ChatMessage, "stream_options": StreamOptions}

Request = TypeVar("Request", bound=msgspec.Struct)


def parse(body: bytes, kind: type[Request]) -> tuple[Request, dict[str, str]]:
    """A JSON body -> the request, and the response header that names the ignored fields (empty where there are none).

    Raises ApiError 400 naming the field.
    """
    try:
        raw = msgspec.json.decode(body)
        if isinstance(raw, dict):
            _refuse_unsupported(raw, kind)
        request = msgspec.convert(raw, kind, str_keys=True)
    except RecursionError:
        raise ApiError(400, "the JSON body is nested too deeply") from None
    except msgspec.ValidationError as error:
        message = str(error)
        path = re.search(r"\$\.([^`]*)`", message)
        missing = re.search(r"required field `(\w+)`", message)
        param = ".".join(match[1].replace("[...]", "") for match in (path, missing) if match)
        raise ApiError(400, message.replace("$.", ""), param or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    return request, ignored_header(_unknown_fields(raw, kind))


def ignored_header(fields: Iterable[str]) -> dict[str, str]:
    """The response header that names ignored fields; empty where there are none."""
    # A client chooses these names: no control characters and no endless header.
    names = [re.sub(r"[^\w.-]", "?", name[:64], flags=re.ASCII) for name in sorted(fields)[:20]]
    return {IGNORED_HEADER: ", ".join(names)} if names else {}


def _refuse_unsupported(raw: dict[str, object], kind: type[msgspec.Struct]) -> None:
    for name, neutral in NEUTRAL.items():
        if name in raw and raw[name] not in neutral and name not in kind.__struct_fields__:
            raise unsupported(f"{name} is not supported by this server", name)
    if raw.get("best_of") not in (None, raw.get("n") or 1):
        raise unsupported("best_of is supported only where it equals n", "best_of")


def _unknown_fields(raw: dict[str, object], kind: type[msgspec.Struct]) -> set[str]:
    """The fields that have no effect because this server does not know them, as `name` or `messages.name`."""
    unknown = raw.keys() - set(kind.__struct_fields__) - NEUTRAL.keys() - ACCEPTED
    for field, inner in NESTED.items():
        value = raw.get(field)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                # Clients send an assistant's message back as they got it, with fields that hold nothing.
                names = entry.keys() - set(inner.__struct_fields__)
                unknown |= {f"{field}.{name}" for name in names if entry[name] not in (None, [])}
    return unknown
