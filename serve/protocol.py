"""The wire: request types with their types and ranges, what is refused, ignored or accepted, and the error object.

Knows the OpenAI API and the engine's `SamplingParams`, not how a request is answered. Types and ranges are checked
here and nowhere else; whoever holds a request from `parse` may rely on them.
"""

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from conf.limits import END_OF_TURN, MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS
from engine.messages import Ready
from graphs.plan import SamplingParams

MAX_CHOICES = 64  # n x prompts
SEEDS = 2**63

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200, as the OpenAI error object. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> bytes:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SamplingRequest(msgspec.Struct, kw_only=True):
    """What both endpoints take. null means: not given."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=16)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-SEEDS, le=SEEDS - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    skip_special_tokens: bool | None = None


class TextPart(msgspec.Struct):
    type: str
    text: str | None = None


FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(msgspec.Struct):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema
    strict: bool | None = None  # arguments are what the model writes, whatever this says


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct):
    name: FunctionName


class NamedTool(msgspec.Struct):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(msgspec.Struct):
    name: FunctionName
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None  # a tool's: the call that it answers
    function_call: dict[str, Any] | None = None  # what tool_calls took the place of


class ChatRequest(SamplingRequest, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct):
    tokens: list[TokenId]
    model: str | None = None


# Parameters of this API, or of servers that speak it, which change the answer and which this server does not have: only
# the values that change nothing are accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "audio",
            "prediction",
            "web_search_options",
            "prompt_logprobs",
            "prompt_embeds",
            "cache_salt",
            "truncate_prompt_tokens",
            "allowed_token_ids",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "chat_template",
        ),
        (None,),
    ),
    **dict.fromkeys(
        ("store", "use_beam_search", "include_stop_str_in_output", "continue_final_message"), (None, False)
    ),
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
IGNORED_HEADER = "x-ignored-parameters"  # of a response: the fields of the request that nobody here knows

Request = TypeVar("Request", bound=msgspec.Struct)


def parse(body: bytes, kind: type[Request]) -> tuple[Request, dict[str, str]]:
    """JSON body -> request, and the response header that names the ignored fields (empty where none is).

    Raises ApiError 400 naming the field.
    """
    try:
        raw = msgspec.json.decode(body)
        if isinstance(raw, dict):
            for name, accepted in NEUTRAL.items():
                if name in raw and raw[name] not in accepted and name not in kind.__struct_fields__:
                    raise ApiError(400, f"{name} is not supported by this server", name, "unsupported_parameter")
            if raw.get("best_of") not in (None, raw.get("n") or 1):
                raise ApiError(400, "best_of is supported only where it equals n", "best_of", "unsupported_parameter")
        request = msgspec.convert(raw, kind, str_keys=True)
    except RecursionError:
        raise ApiError(400, "the JSON body is nested too deeply") from None
    except msgspec.ValidationError as error:
        message = str(error)
        path = re.search(r"\$\.([^`]*)`", message)
        missing = re.search(r"required field `(\w+)`", message)
        param = ".".join(found[1].replace("[...]", "") for found in (path, missing) if found)
        raise ApiError(400, message.replace("$.", ""), param or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    unknown = raw.keys() - set(kind.__struct_fields__) - NEUTRAL.keys() - ACCEPTED
    for field, inner in (("messages", ChatMessage), ("stream_options", StreamOptions)):
        given = raw.get(field) or []
        for value in given if isinstance(given, list) else [given]:
            # Clients send an assistant's message back as they got it, with fields that hold nothing.
            odd = value.keys() - set(inner.__struct_fields__)
            unknown |= {f"{field}.{name}" for name in odd if value[name] not in (None, [])}
    # A client chooses these names: no control characters and no endless header.
    names = ", ".join(re.sub(r"[^\w.-]", "?", name[:64], flags=re.ASCII) for name in sorted(unknown)[:20])
    return request, {IGNORED_HEADER: names} if names else {}


def sampling_params(
    request: SamplingRequest,
    prompt_tokens: int,
    ready: Ready,
    *,
    prompt_field: str,
    default_max: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """The engine's parameters for a prompt of `prompt_tokens`; `default_max` None: as many as the context holds.

    Raises ApiError 400 where prompt and answer do not fit, or a token id is not in the vocabulary.
    """
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    room = ready.max_context - prompt_tokens
    asked = request.max_completion_tokens or request.max_tokens
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    if room < (asked or 1):
        given = f"and max_tokens asks for {asked}" if asked else "and at least 1 is to be generated"
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens {given}: more than the context of {ready.max_context} tokens",
            "max_tokens" if asked and room > 0 else prompt_field,
            "context_length_exceeded",
        )
    max_tokens = asked or min(room, default_max or room)
    if (request.min_tokens or 0) > max_tokens:
        raise ApiError(400, f"min_tokens {request.min_tokens} exceeds max_tokens {max_tokens}", "min_tokens")
    stop_token_ids, logit_bias = request.stop_token_ids or [], request.logit_bias or {}
    check_tokens(stop_token_ids, ready, "stop_token_ids")
    check_tokens(list(logit_bias), ready, "logit_bias")
    ends = () if request.ignore_eos else END_OF_TURN
    return SamplingParams(
        max_tokens=max_tokens,
        # A negative seed is a seed like any other: the engine takes 63 bits.
        seed=secrets.randbits(63) if request.seed is None else request.seed % SEEDS,
        min_tokens=request.min_tokens or 0,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=request.top_p or 1.0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=logit_bias,
        # A model made for tests may have a vocabulary without the control tokens.
        stop_token_ids=tuple(dict.fromkeys([*(t for t in ends if t < ready.vocab_size), *stop_token_ids])),
        logprobs=logprobs,
    )


def check_tokens(tokens: list[int], ready: Ready, param: str) -> None:
    """Raises ApiError 400 for an id outside the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < ready.vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < ready.vocab_size)
        raise ApiError(400, f"token id {wrong} is outside the vocabulary of {ready.vocab_size} tokens", param)
