"""POST /v1/chat/completions: a conversation to the assistant's next message."""

import secrets
import time
from typing import NamedTuple

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from graphs.plan import SamplingParams
from serve.conversation import DEFAULT_EFFORT, chat_prompt, continued, conversation_turns, prefilled_call
from serve.generation import Service, Serving
from serve.grammar import Grammar, Offer, chat_grammar, requested_form
from serve.guard import cache_salt
from serve.message import ChatChoice, ChatDelta, MessageDelta, whole_choice
from serve.openapi import EVENTS, JSON, documented
from serve.parsing import parse
from serve.prompt import PromptReader
from serve.protocol import ApiError, ChatRequest, JsonObject, NamedTool
from serve.sampling import check_tokens, sampling_params
from serve.stream import EventFormat, EventStream, collected, json_response
from serve.text import StopStrings


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the route of this file to `app`."""

    @app.post("/v1/chat/completions", openapi_extra=documented(ChatRequest, (JSON, EVENTS)))
    async def chat_completions(request: Request) -> Response:
        return await create(service, request)


async def create(service: Service, http_request: Request) -> Response:
    """Answers a chat request. Raises ApiError."""
    request, headers, names, prompt, prefilled, sampling, grammar = await service.prepared(http_request, prepared)
    sampling = msgspec.structs.replace(sampling, grammar=await service.checked(grammar))
    stops = StopStrings(request.stop_strings)
    n = request.n or 1
    reader = None
    if request.prompt_logprobs is not None:
        reader = PromptReader(prompt, request.prompt_logprobs, service.tokenizer)
    generation = service.submit(
        [(prompt, sampling)],
        n,
        lambda _, index: ChatChoice(
            index, request, names, stops, service.tokenizer, prefilled, reader if index == 0 else None
        ),
        cache_salt(http_request.scope, request.cache_salt),
    )
    constant: JsonObject = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": service.model_name,
    }
    prompt_ids: JsonObject = {"prompt_token_ids": prompt} if request.return_token_ids else {}
    seconds = service.server.request_timeout
    if request.stream:
        form = EventFormat({**constant, "object": "chat.completion.chunk"}, request, generation.usage)
        roles = [ChatDelta(index, MessageDelta(role="assistant", content=""), None, None) for index in range(n)]
        opening = b"".join(form.event(role, prompt_ids if role.index == 0 else None) for role in roles)
        return EventStream(generation, form, opening, seconds, headers)
    by_choice = await collected(generation, seconds, http_request.receive)
    reply: JsonObject = {
        **constant,
        "object": "chat.completion",
        "choices": [whole_choice(deltas) for deltas in by_choice],
        "usage": generation.usage(),
        **prompt_ids,
    }
    if reader:
        reply["prompt_logprobs"] = reader.entries
    return json_response(reply, headers)


class PreparedChat(NamedTuple):
    """What a chat request's body becomes."""

    request: ChatRequest  # without messages and tools
    headers: dict[str, str]
    functions: list[str]  # names of those that may be called
    prompt: list[int]
    prefilled: list[int]  # tokens of the answer at the prompt's end
    sampling: SamplingParams
    grammar: Grammar | None  # what the answer is held to


def prepared(body: bytes, serving: Serving) -> PreparedChat:
    """Raises ApiError."""
    request, headers = parse(body, ChatRequest)
    serving.require_model(request.model)
    check(request)
    turns, ready, tokenizer = conversation_turns(request.messages), serving.ready, serving.tokenizer
    if request.continue_final_message:
        turns, prefilled = continued(turns, tokenizer, ready.max_context)
    else:
        prefilled = prefilled_call(request, tokenizer)
    tools = [] if request.tool_choice == "none" else request.tools or []
    prompt = chat_prompt(serving, turns, tools, request.effort or DEFAULT_EFFORT) + prefilled
    sampling = sampling_params(request, len(prompt), ready)
    check_tokens(prompt, ready, "messages")
    names = [tool.function.name for tool in tools]
    lean = msgspec.structs.replace(request, messages=[], tools=None)
    return PreparedChat(lean, headers, names, prompt, prefilled, sampling, requested_grammar(request))


def requested_grammar(request: ChatRequest) -> Grammar | None:
    """What the answer is held to; None: anything. Raises ApiError 400."""
    form = requested_form(request)
    if request.continue_final_message:
        if form:
            raise ApiError(400, f"{form.place}: continue_final_message forbids it", form.place)
        return None
    offers = []
    for i, tool in enumerate(request.tools or [] if request.tool_choice != "none" else []):
        function = tool.function
        place = f"tools[{i}].function.parameters"
        offers.append(Offer(function.name, function.parameters, bool(function.strict), place))
    demanded = []
    if isinstance(request.tool_choice, NamedTool):
        demanded = [request.tool_choice.function.name]
    elif request.tool_choice == "required":
        demanded = [offer.name for offer in offers]
    return chat_grammar(form, offers, demanded)


def check(request: ChatRequest) -> None:
    """Raises ApiError 400 for fields that do not fit together."""
    names = [tool.function.name for tool in request.tools or []]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", "tools")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        raise ApiError(
            400, f"tool_choice names {request.tool_choice.function.name!r}, which is not among tools", "tool_choice"
        )
    if request.tool_choice == "required" and not names:
        raise ApiError(400, "tool_choice required needs tools", "tool_choice")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    if request.continue_final_message:
        check_continuation(request)
    elif request.add_generation_prompt is False:
        raise ApiError(400, "add_generation_prompt: false needs continue_final_message", "add_generation_prompt")


def check_continuation(request: ChatRequest) -> None:
    """Raises ApiError 400 where the answer cannot go on with the last message."""
    last = request.messages[-1]
    if last.role != "assistant" or last.tool_calls or not last.content:
        message = "continue_final_message needs a last message of the assistant with content and without tool_calls"
        raise ApiError(400, message, "continue_final_message")
    if request.add_generation_prompt:
        raise ApiError(400, "continue_final_message forbids add_generation_prompt: true", "add_generation_prompt")
    if request.tool_choice not in (None, "auto", "none"):
        raise ApiError(400, "continue_final_message forbids a tool_choice that demands a call", "tool_choice")
