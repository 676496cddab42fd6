"""POST /tokenize and /detokenize: the token ids of a text or a conversation, and the text of token ids. GET
/tokenizer_info: what clients that encode through these routes want to know of the tokenizer.
"""

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from serve.conversation import DEFAULT_EFFORT, chat_prompt, conversation_turns
from serve.generation import Service, Serving
from serve.openapi import documented
from serve.parsing import parse
from serve.protocol import ApiError, DetokenizeRequest, JsonObject, TokenizeRequest
from serve.sampling import check_tokens
from serve.stream import encoded_response, json_response


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of this file to `app`."""

    @app.post("/tokenize", openapi_extra=documented(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        return encoded_response(*await service.prepared(request, tokenized))

    @app.post("/detokenize", openapi_extra=documented(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        return encoded_response(*await service.prepared(request, detokenized))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """In the names of a tokenizer_config.json. Null: no text encodes as a control token, so none has a spelling
        that a client could encode; and conversations are rendered by the server, not by a template.
        """
        spelled = dict.fromkeys(("bos_token", "eos_token", "pad_token", "chat_template"))
        limit = service.require_ready().max_context
        return json_response({"tokenizer_class": "o200k_harmony", "model_max_length": limit, **spelled})


def tokenized(body: bytes, serving: Serving) -> tuple[bytes, dict[str, str]]:
    """The answer to /tokenize as JSON, and its headers. Raises ApiError."""
    request, headers = parse(body, TokenizeRequest)
    serving.require_model(request.model)
    limit, tokenizer = serving.ready.max_context, serving.tokenizer
    if request.messages is not None and request.prompt is None:
        ids = chat_prompt(serving, conversation_turns(request.messages), request.tools, DEFAULT_EFFORT)
    elif request.prompt is not None and request.messages is None:
        ids = tokenizer.encode(request.prompt, limit)
    else:
        raise ApiError(400, "give either prompt or messages", "prompt")
    if len(ids) > limit:  # encoding stopped early: the count would be wrong
        raise ApiError(400, f"more than the context of {limit} tokens", code="context_length_exceeded")
    reply: JsonObject = {"count": len(ids), "max_model_len": limit, "tokens": ids}
    if request.return_token_strs:
        reply["token_strs"] = [tokenizer.token_text(token) for token in ids]
    return msgspec.json.encode(reply), headers


def detokenized(body: bytes, serving: Serving) -> tuple[bytes, dict[str, str]]:
    """The answer to /detokenize as JSON, and its headers. Raises ApiError."""
    request, headers = parse(body, DetokenizeRequest)
    serving.require_model(request.model)
    check_tokens(request.tokens, serving.ready, "tokens")
    return msgspec.json.encode({"prompt": serving.tokenizer.decode(request.tokens, skip_special=False)}), headers
