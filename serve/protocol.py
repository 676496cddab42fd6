"""The wire: request types with their types and ranges, and the error object.

Knows the OpenAI API, not how a body is read (`parsing`) nor how a request is answered. Types and ranges are checked
here and nowhere else; code that holds a request from `parsing.parse` may rely on them.
"""

from typing import Annotated, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta

from conf.limits import END_OF_TURN, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS

JsonObject: TypeAlias = dict[str, object]  # as decoded, or as msgspec can encode it

MAX_CHOICES = 64  # of a request: n × prompts
SEEDS = 2**63
MAX_ERROR_CHARACTERS = 1000  # of an error's message

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_ERROR_TYPES = {503: "overloaded_error", 504: "timeout_error", **_ERROR_TYPES}
# An error's code that Anthropic's client acts on: it sends the whole conversation, without a thread.
THREAD_UNSUPPORTED = "thread_unsupported_request"
_ANTHROPIC_PATH = "/v1/messages"  # and all paths below it


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API, else to OpenAI's."""
    return path == _ANTHROPIC_PATH or path.startswith(_ANTHROPIC_PATH + "/")


def shortened(text: str) -> str:
    """The text, cut where it is longer than an error needs: it may repeat what a client wrote."""
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + "…"


class ApiError(Exception):
    """An answer other than 200, as the error object of the API. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}
        self.message, self.param = shortened(message), None if param is None else shortened(param)

    def __reduce__(self) -> tuple[object, ...]:  # to be pickled: an exception's own is for its message alone
        return ApiError, (self.status, self.message, self.param, self.code, self.headers)

    def body(self, path: str = "") -> bytes:
        """The error object as JSON, in the shape of the API that `path` belongs to: Anthropic's or OpenAI's."""
        if is_anthropic(path):
            return self.anthropic_body()
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def anthropic_body(self) -> bytes:
        """The error object as Anthropic's API has it. It has no place for the field: the message names it."""
        kind = _ANTHROPIC_ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        named = self.param is None or self.param in self.message
        error: JsonObject = {"type": kind, "message": self.message if named else f"{self.param}: {self.message}"}
        if self.code == THREAD_UNSUPPORTED:
            error["details"] = {"error_code": self.code}
        return msgspec.json.encode({"type": "error", "error": error})


def unsupported(message: str, param: str) -> ApiError:
    """The answer to a field that this server knows but cannot act on."""
    return ApiError(400, message, param, "unsupported_parameter")


AnswerTokens = Annotated[int, Meta(ge=1)]  # -1 means: not given, see `parsing.normalise`
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(max_length=256)]  # an empty one never stops
TokenId = Annotated[int, Meta(ge=0)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
LogitBias = Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)]
# The model's own stop tokens take their places first.
StopTokenIds = Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS - len(END_OF_TURN))]


class StreamOptions(msgspec.Struct):
    """How a reply is streamed."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # with include_usage: every event has the usage so far


class JsonSchema(msgspec.Struct, kw_only=True):
    """A schema under a name. It is held to whether or not it is `strict`."""

    name: str | None = None
    description: str | None = None
    schema: JsonObject | bool | None = None  # none: any JSON
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct):
    """The same as vLLM names it: one of the fields."""

    json: JsonObject | str | None = None  # a schema, or its text
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # in the notation of Lark or GBNF
    json_object: bool | None = None
    structural_tag: str | JsonObject | None = None  # refused


class SamplingRequest(msgspec.Struct, kw_only=True):
    """The fields that both endpoints take. null means: not given."""

    model: str | None = None
    max_tokens: AnswerTokens | None = None
    max_completion_tokens: AnswerTokens | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None  # 0: the likeliest token alone
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-SEEDS, le=SEEDS - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # logprobs name a token `token_id:5` instead of by its text
    prompt_logprobs: TopLogprobs | None = None  # of each token of the prompt, and of so many of the likeliest
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None  # shares cached prompts with equals
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None  # these four are older names of the fields of structured_outputs
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def prompt_logprobs_count(self) -> int | None:
        """How many of the likeliest tokens the reply names beside each token of the prompt; None: no prompt there."""
        return self.prompt_logprobs

    @property
    def stop_strings(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(SamplingRequest, kw_only=True):
    """POST /v1/completions."""

    prompt_field: ClassVar[str] = "prompt"
    default_max_tokens: ClassVar[int | None] = 16
    max_tokens: Annotated[int, Meta(ge=0)] | None = None  # 0: the prompt alone
    prompt: str | list[str | int | list[int]]
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    skip_special_tokens: bool | None = None

    @property
    def top_logprobs_count(self) -> int | None:
        return self.logprobs

    @property
    def prompt_logprobs_count(self) -> int | None:
        counts = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in counts if count is not None), default=None)


class ContentPart(msgspec.Struct):
    """A piece of a message's content; only those of the type "text" are supported."""

    type: str
    text: str | None = None


FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$(?!\n)")]


class FunctionDefinition(msgspec.Struct):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None  # JSON schema
    strict: bool | None = None  # the arguments of its calls are held to the schema


class Tool(msgspec.Struct):
    """A tool that the model may use: a function is the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[list[Tool], Meta(max_length=128)]


class FunctionReference(msgspec.Struct):
    """A function named by a tool choice."""

    name: FunctionName


class NamedTool(msgspec.Struct):
    """A tool choice that demands a call of one function."""

    type: Literal["function"]
    function: FunctionReference


class FunctionCall(msgspec.Struct):
    """A call as the model wrote it earlier in the conversation."""

    name: FunctionName
    arguments: str


class ToolCall(msgspec.Struct):
    """A call in a message of the assistant."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None  # in a message of the role "tool": the call that it answers
    function_call: JsonObject | None = None  # deprecated by OpenAI in favour of tool_calls; refused


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# GPT-OSS knows three efforts and always thinks; the others become the nearest.
EFFORTS: dict[Effort, str] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


class TemplateArguments(msgspec.Struct):
    """`chat_template_kwargs`: what other servers hand to a chat template."""

    reasoning_effort: Effort | None = None


class ReasoningOptions(msgspec.Struct):
    """`reasoning`, as the Responses API and routers send it."""

    effort: Effort | None = None


class ChatRequest(SamplingRequest, kw_only=True):
    """POST /v1/chat/completions."""

    prompt_field: ClassVar[str] = "messages"
    default_max_tokens: ClassVar[int | None] = None  # as many as the context holds
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: TemplateArguments | None = None
    include_reasoning: bool | None = None
    continue_final_message: bool | None = None  # the answer goes on with the last message, an assistant's
    add_generation_prompt: bool | None = None  # what clients give beside it: its opposite
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def effort(self) -> str | None:
        """The effort as GPT-OSS knows it; where it is given more than once, reasoning_effort goes first."""
        given = self.reasoning_effort
        if given is None and self.reasoning:
            given = self.reasoning.effort
        if given is None and self.chat_template_kwargs:
            given = self.chat_template_kwargs.reasoning_effort
        return EFFORTS[given] if given else None

    @property
    def top_logprobs_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(msgspec.Struct):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None
