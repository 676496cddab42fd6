"""A validated request to the engine's `SamplingParams`: defaults, and the limits of context and vocabulary."""

import secrets

from conf.limits import END_OF_TURN
from engine.messages import Ready
from graphs.plan import SamplingParams
from serve.protocol import SEEDS, ApiError, ChatRequest, CompletionRequest, unsupported


def sampling_params(request: CompletionRequest | ChatRequest, prompt_tokens: int, ready: Ready) -> SamplingParams:
    """The engine's parameters for a prompt of `prompt_tokens`.

    Raises ApiError 400 where prompt and answer do not fit, a token id is not in the vocabulary, or log probabilities of
    the prompt are wanted that this server does not compute.
    """
    if request.prompt_logprobs_count is not None and not ready.scores_prompts:
        raise unsupported(
            "log probabilities of the prompt (prompt_logprobs, or echo with logprobs) are not computed by this server; "
            "its configuration key buckets.prompt_logprobs turns them on",
            "logprobs" if request.prompt_logprobs is None else "prompt_logprobs",
        )
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs cannot be streamed; echo with logprobs can", "prompt_logprobs")
    stop_token_ids, logit_bias = request.stop_token_ids or [], request.logit_bias or {}
    max_tokens = _max_tokens(request, prompt_tokens, ready.max_context)
    if (request.min_tokens or 0) > max_tokens:
        raise ApiError(400, f"min_tokens {request.min_tokens} exceeds max_tokens {max_tokens}", "min_tokens")
    check_tokens(stop_token_ids, ready, "stop_token_ids")
    check_tokens(list(logit_bias), ready, "logit_bias")
    # A model made for tests may have a vocabulary without the control tokens.
    model_ends = [] if request.ignore_eos else [token for token in END_OF_TURN if token < ready.vocab_size]
    return SamplingParams(
        max_tokens=max_tokens,
        # A negative seed is a seed like any other: the engine takes 63 bits.
        seed=secrets.randbits(63) if request.seed is None else request.seed % SEEDS,
        min_tokens=request.min_tokens or 0,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=1 if request.top_p == 0 else max(request.top_k or 0, 0),
        top_p=request.top_p or 1.0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=logit_bias,
        stop_token_ids=tuple(dict.fromkeys([*model_ends, *stop_token_ids])),
        logprobs=request.top_logprobs_count,
        prompt_logprobs=request.prompt_logprobs_count,
    )


def check_tokens(tokens: list[int], ready: Ready, param: str) -> None:
    """Raises ApiError 400 for an id outside the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < ready.vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < ready.vocab_size)
        raise ApiError(400, f"token id {wrong} is outside the vocabulary of {ready.vocab_size} tokens", param)


def _max_tokens(request: CompletionRequest | ChatRequest, prompt_tokens: int, max_context: int) -> int:
    """The most tokens of the answer. Raises ApiError 400."""
    given = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(given) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    room = max_context - prompt_tokens
    requested = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if room < (1 if requested is None else requested):
        need = f"and max_tokens asks for {requested}" if requested else "and at least 1 is to be generated"
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens {need}: more than the context of {max_context} tokens",
            "max_tokens" if requested and room > 0 else request.prompt_field,
            "context_length_exceeded",
        )
    return min(room, request.default_max_tokens or room) if requested is None else requested
