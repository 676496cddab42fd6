"""POST /v1/completions: prompts to token ids, generated ids to text.

Knows nothing of chat. Control tokens spelled out in a prompt's text are text; a client sends them as token ids.
"""

import asyncio
import secrets
import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from conf.limits import FIRST_SPECIAL
from engine.messages import Delta, FinishReason, Ready, TokenLogprobs
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams
from serve.generation import Service, Serving
from serve.grammar import Grammar, requested_form, text_grammar
from serve.guard import cache_salt
from serve.openapi import EVENTS, JSON, documented
from serve.parsing import parse
from serve.prompt import PromptEntry, PromptReader
from serve.protocol import MAX_CHOICES, ApiError, CompletionRequest, JsonObject
from serve.sampling import check_tokens, sampling_params
from serve.stream import EventFormat, EventStream, collected, json_response
from serve.text import StopMatcher, StopStrings, token_names, utf8_decoder

TextLogprobs = dict[str, list[object]]  # an entry a token in each of the lists


class TextDelta(msgspec.Struct):
    """What one Delta of the engine adds to a choice: the element of `choices` in an event, joined also in a reply."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[PromptEntry] | msgspec.UnsetType = msgspec.UNSET  # of the whole prompt, with the last delta

    @property
    def has_output(self) -> bool:
        """False for an incomplete character, or text that may become a stop string."""
        return bool(self.text or self.finish_reason or self.logprobs or self.token_ids is not msgspec.UNSET)


class TextChoice:
    """Reads one choice: tokens to visible text, up to a stop token or a stop string.

    Stop strings count from the first token that may end the answer: the text of the first `min_tokens` is not searched.
    """

    def __init__(
        self,
        index: int,
        request: CompletionRequest,
        prompt: list[int],
        echo: str,
        stops: StopStrings,
        tokenizer: Tokenizer,
    ) -> None:
        """`echo`: the text before the answer's own."""
        self.completion_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self._index, self._tokenizer = index, tokenizer
        self._skip_special = request.skip_special_tokens is not False
        self._min_tokens = request.min_tokens or 0
        self._return_token_ids = bool(request.return_token_ids)
        self._prompt: list[int] | None = prompt  # None once the first delta is out
        self._echo = echo
        self._name = token_names(tokenizer, request.return_tokens_as_token_ids)
        self._top = request.logprobs or 0
        # Of the prompt's tokens: those that get log probabilities as the answer's do, and have not yet, with offsets.
        self._unread: Iterator[tuple[int, int]] = iter(())
        if request.echo and request.logprobs is not None:
            self._unread = zip(prompt, text_offsets(prompt, tokenizer, self._skip_special), strict=True)
        self._reader = None
        if request.prompt_logprobs is not None:
            self._reader = PromptReader(prompt, request.prompt_logprobs, tokenizer)
        self._decoder = utf8_decoder()
        self._stop_matcher = StopMatcher(stops)
        self._characters = 0  # decoded so far

    def feed(self, delta: Delta) -> TextDelta:
        """What `delta` adds that the client may see."""
        self.cached_tokens += delta.cached_tokens or 0
        prompt, self._prompt = self._prompt, None
        text, self._echo = self._echo, ""
        self._characters += len(text)
        offsets = []
        stop_position = len(delta.tokens) - 1 if delta.finish_reason == "stop" else None
        for position, token in enumerate(delta.tokens):
            self.completion_tokens += 1
            offsets.append(self._characters)
            if position == stop_position or (token >= FIRST_SPECIAL and self._skip_special):
                continue
            characters = self._decoder.decode(self._tokenizer.token_bytes(token))
            self._characters += len(characters)
            text += characters if self.completion_tokens <= self._min_tokens else self._stop_matcher.feed(characters)
            if self._stop_matcher.stopped:
                break
        if delta.finish_reason:
            text += self._stop_matcher.feed(self._decoder.decode(b"", final=True))
            text += self._stop_matcher.finish()
        text_delta = TextDelta(self._index, text, None, "stop" if self._stop_matcher.stopped else delta.finish_reason)
        if delta.logprobs is not None:
            of_prompt: list[TokenLogprobs | None] = [*(delta.prompt_logprobs or [])]
            if prompt is not None:
                of_prompt.insert(0, None)  # of the first token: nothing stands before it
            read = list(zip(of_prompt, self._unread, strict=False))
            read += zip(delta.logprobs, zip(delta.tokens, offsets, strict=False), strict=False)
            text_delta.logprobs = self._logprobs(read)
        if self._reader:
            self._reader.feed(delta.prompt_logprobs or [])
            if text_delta.finish_reason:
                text_delta.prompt_logprobs = self._reader.entries
        if self._return_token_ids:
            text_delta.token_ids = delta.tokens[: len(offsets)]
            text_delta.prompt_token_ids = msgspec.UNSET if prompt is None else prompt
        return text_delta

    def _logprobs(self, read: list[tuple[TokenLogprobs | None, tuple[int, int]]]) -> TextLogprobs:
        """read: (log probabilities, (the token, its offset in the text))."""
        name, top = self._name, self._top
        return {
            "tokens": [name(token) for _, (token, _) in read],
            "token_logprobs": [entry and entry.logprob for entry, _ in read],
            # As in OpenAI's API: the token itself is there even where it is not among the likeliest.
            "top_logprobs": [
                entry
                and {name(token): entry.logprob}
                | dict(zip(map(name, entry.top_ids[:top]), entry.top_logprobs[:top], strict=True))
                for entry, (token, _) in read
            ],
            "text_offset": [offset for _, (_, offset) in read],
        }


def text_offsets(tokens: list[int], tokenizer: Tokenizer, skip_special: bool) -> Iterator[int]:
    """By token: how many characters of the text of all stand before it. A token within a character begins with it."""
    decoder, characters = utf8_decoder(), 0
    for token in tokens:
        yield characters
        if not (skip_special and token >= FIRST_SPECIAL):
            characters += len(decoder.decode(tokenizer.token_bytes(token)))


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the route of this file to `app`."""

    @app.post("/v1/completions", openapi_extra=documented(CompletionRequest, (JSON, EVENTS)))
    async def completions(request: Request) -> Response:
        return await create(service, request)


async def create(service: Service, http_request: Request) -> Response:
    """Answers a completion request. Raises ApiError."""
    request, headers, prompts, asked = await service.prepared(http_request, prepared)
    grammar = await service.checked(asked)
    jobs: list[tuple[list[int], SamplingParams]] = []
    for prompt in prompts:
        if jobs:
            await asyncio.sleep(0)  # all prompts together may have millions of tokens
        jobs.append((prompt.tokens.tolist(), msgspec.structs.replace(prompt.sampling, grammar=grammar)))
    stops = StopStrings(request.stop_strings)
    generation = service.submit(
        jobs,
        request.n or 1,
        lambda job, index: TextChoice(index, request, jobs[job][0], prompts[job].echo, stops, service.tokenizer),
        cache_salt(http_request.scope, request.cache_salt),
    )
    constant: JsonObject = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    seconds = service.server.request_timeout
    if request.stream:
        return EventStream(generation, EventFormat(constant, request, generation.usage), b"", seconds, headers)
    by_choice = await collected(generation, seconds, http_request.receive)
    choices = [whole_choice(deltas) for deltas in by_choice]
    return json_response({**constant, "choices": choices, "usage": generation.usage()}, headers)


class Prompt(NamedTuple):
    """One of the prompts of a request."""

    tokens: "array[int]"  # of 4 bytes each: there may be many
    echo: str  # the text with which the answer begins
    sampling: SamplingParams


def prepared(body: bytes, serving: Serving) -> tuple[CompletionRequest, dict[str, str], list[Prompt], Grammar | None]:
    """The request without its prompts, the headers of its answer, the prompts, and what answers are held to.

    Raises ApiError.
    """
    request, headers = parse(body, CompletionRequest)
    serving.require_model(request.model)
    prompts, n, tokenizer = separate_prompts(request), request.n or 1, serving.tokenizer
    if n * len(prompts) > MAX_CHOICES:
        raise ApiError(400, f"n x prompts is {n} x {len(prompts)}, at most {MAX_CHOICES} are allowed", "n")
    encoded = encode(prompts, serving.ready, tokenizer)
    skip_special = request.skip_special_tokens is not False
    made = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        echo = ""
        if request.echo:
            echo = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special)
        made.append(Prompt(array("i", ids), echo, sampling_params(request, len(ids), serving.ready)))
    form = requested_form(request)
    return msgspec.structs.replace(request, prompt=""), headers, made, text_grammar(form) if form else None


def separate_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, each a text or token ids. Raises ApiError 400 for a mixed list."""
    if isinstance(request.prompt, str):
        return [request.prompt]
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    token_ids = [prompt for prompt in request.prompt if isinstance(prompt, int)]
    token_lists = [prompt for prompt in request.prompt if isinstance(prompt, list)]
    if len(request.prompt) not in (len(texts), len(token_ids), len(token_lists)):
        raise ApiError(400, "prompt mixes texts, token ids and lists", "prompt")
    return [token_ids] if token_ids else [*texts, *token_lists] or [""]


def encode(prompts: list[str | list[int]], ready: Ready, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each prompt. Raises ApiError 400 for an empty prompt or an id outside the vocabulary."""
    encoded = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, ready.max_context) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "the prompt is empty, and GPT-OSS has no token that begins a text", "prompt")
        if len(ids) <= ready.max_context:  # a longer one is refused for its length
            check_tokens(ids, ready, "prompt")
        encoded.append(ids)
    return encoded


def whole_choice(deltas: list[TextDelta]) -> TextDelta:
    """All deltas of a choice as the element of `choices` in a reply that is not streamed."""
    text = "".join(delta.text for delta in deltas)
    choice = TextDelta(deltas[0].index, text, None, deltas[-1].finish_reason)
    if logprobs := [delta.logprobs for delta in deltas if delta.logprobs]:
        choice.logprobs = {name: [entry for lists in logprobs for entry in lists[name]] for name in logprobs[0]}
    if deltas[0].token_ids is not msgspec.UNSET:
        choice.token_ids = [token for delta in deltas for token in delta.token_ids or []]
        choice.prompt_token_ids = deltas[0].prompt_token_ids
    choice.prompt_logprobs = deltas[-1].prompt_logprobs
    return choice
