"""POST /v1/completions: prompts to token ids, generated ids to text, parts to the reply.

Knows nothing of chat. Prompts given as text are text throughout: control tokens are sent as token ids.
"""

import secrets
import time
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive

from conf.limits import FIRST_SPECIAL
from engine.messages import Delta, FinishReason, Ready, TokenLogprobs
from engine.tokenizer import Tokenizer
from serve.generation import Service
from serve.protocol import MAX_CHOICES, ApiError, CompletionRequest, check_tokens, parse, sampling_params
from serve.stream import EventFormat, EventStream, collected
from serve.text import StopStrings, StopWatch, utf8_decoder

DEFAULT_MAX_TOKENS = 16


class Part(msgspec.Struct):
    """What one Delta adds to a choice; as it is on the wire."""

    index: int
    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: FinishReason | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET

    @property
    def tells(self) -> bool:
        """False for half a character, or what may become a stop string."""
        return bool(self.text or self.finish_reason or self.logprobs or self.token_ids is not msgspec.UNSET)


class TextChoice:
    """Reads one choice: tokens to visible text, up to a stop token or a stop string.

    Stop strings count from the first token that may end the answer: text of the first `min_tokens` holds none.
    """

    def __init__(
        self, index: int, request: CompletionRequest, prompt: list[int], stops: StopStrings, tokenizer: Tokenizer
    ) -> None:
        self.completion_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self._index, self._tokenizer = index, tokenizer
        self._skip_special = request.skip_special_tokens is not False
        self._min_tokens = request.min_tokens or 0
        self._with_ids = bool(request.return_token_ids)
        self._prompt: list[int] | None = prompt  # until the first part has told it
        self._echo = bool(request.echo)
        self._decoder = utf8_decoder()
        self._watch = StopWatch(stops)
        self._characters = 0  # decoded so far, for logprobs' text_offset

    def feed(self, delta: Delta) -> Part:
        text, used, offsets = "", 0, []
        if self._prompt is not None and self._echo:
            text = self._tokenizer.decode(self._prompt, self._skip_special)
        self.cached_tokens += delta.cached_tokens or 0
        end = len(delta.tokens) if delta.finish_reason == "stop" else 0  # the stop token is not in the text
        for used, token in enumerate(delta.tokens, 1):
            self.completion_tokens += 1
            offsets.append(self._characters)
            if used == end or (token >= FIRST_SPECIAL and self._skip_special):
                continue
            new = self._decoder.decode(self._tokenizer.token_bytes(token))
            self._characters += len(new)
            text += new if self.completion_tokens <= self._min_tokens else self._watch.feed(new)
            if self._watch.stopped:
                break
        if delta.finish_reason and not self._watch.stopped:
            text += self._watch.feed(self._decoder.decode(b"", final=True))
            text += self._watch.finish()
        part = Part(self._index, text, None, "stop" if self._watch.stopped else delta.finish_reason)
        if delta.logprobs is not None:
            part.logprobs = self._logprobs(delta.tokens[:used], delta.logprobs, offsets)
        if self._with_ids:
            part.token_ids = delta.tokens[:used]
            if self._prompt is not None:
                part.prompt_token_ids = self._prompt
        self._prompt = None
        return part

    def _logprobs(self, tokens: list[int], logprobs: list[TokenLogprobs], offsets: list[int]) -> dict[str, list[Any]]:
        name = self._tokenizer.token_text
        return {
            "tokens": [name(token) for token in tokens],
            "token_logprobs": [entry.logprob for entry in logprobs[: len(tokens)]],
            # As in OpenAI's: the sampled token is there even where it is not among the most likely.
            "top_logprobs": [
                {name(token): entry.logprob} | dict(zip(map(name, entry.top_ids), entry.top_logprobs, strict=True))
                for token, entry in zip(tokens, logprobs, strict=False)
            ],
            "text_offset": offsets,
        }


async def create(service: Service, body: bytes, receive: Receive) -> Response | None:
    """Answers the request; None when the client went away. Raises ApiError."""
    service.accepting()
    request, headers = parse(body, CompletionRequest)
    ready = service.accepting(request.model)
    if request.echo and request.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported: prompt tokens have no logprobs here", "logprobs")
    texts = _prompts(request)
    n = request.n or 1
    if n * len(texts) > MAX_CHOICES:
        raise ApiError(400, f"n x prompts is {n} x {len(texts)}, at most {MAX_CHOICES} are allowed", "n")
    prompts = await service.encoded(len(body), _encode, texts, ready, service.tokenizer)
    jobs = [
        (
            ids,
            sampling_params(
                request,
                len(ids),
                ready,
                prompt_field="prompt",
                default_max=DEFAULT_MAX_TOKENS,
                logprobs=request.logprobs,
            ),
        )
        for ids in prompts
    ]
    stops = StopStrings(request.stop_strings)
    generation = service.submit(
        jobs, n, lambda i, index: TextChoice(index, request, prompts[i], stops, service.tokenizer)
    )
    constant = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    seconds = service.server.request_timeout
    if request.stream:
        return EventStream(generation, EventFormat(constant, request.include_usage), b"", seconds, headers)
    by_choice = await collected(generation, seconds, receive)
    if by_choice is None:
        return None
    reply = {**constant, "choices": [_join(parts) for parts in by_choice], "usage": generation.usage()}
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=headers)


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts, one each: a text or ids."""
    given = request.prompt
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise ApiError(400, "prompt mixes texts, token ids and lists", "prompt")
    return [given] if kinds == {int} else given or [""]


def _encode(prompts: list[str | list[int]], ready: Ready, tokenizer: Tokenizer) -> list[list[int]]:
    encoded = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, ready.max_context) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "the prompt is empty, and GPT-OSS has no token that begins a text", "prompt")
        if len(ids) <= ready.max_context:  # a longer one is refused for its length
            check_tokens(ids, ready, "prompt")
        encoded.append(ids)
    return encoded


def _join(parts: list[Part]) -> Part:
    """The whole choice, as the non-streaming reply has it."""
    whole = Part(parts[0].index, "".join(part.text for part in parts), None, parts[-1].finish_reason)
    told = [part.logprobs for part in parts if part.logprobs]
    if told:
        whole.logprobs = {key: [entry for logprobs in told for entry in logprobs[key]] for key in told[0]}
    if parts[0].token_ids is not msgspec.UNSET:
        whole.token_ids = [token for part in parts for token in part.token_ids]
        whole.prompt_token_ids = parts[0].prompt_token_ids
    return whole
