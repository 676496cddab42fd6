"""POST /tokenize and /detokenize: the token ids of a text or a conversation, and the text of token ids. GET
/tokenizer_info: what clients that encode through these routes want to know of the tokenizer.
"""

from fastapi import FastAPI, Request
from starlette.responses import Response

from serve.conversation import DEFAULT_EFFORT, chat_prompt, conversation_turns
from serve.generation import Service, in_thread_if_large
from serve.openapi import documented
from serve.parsing import parse
from serve.protocol import ApiError, DetokenizeRequest, JsonObject, TokenizeRequest
from serve.sampling import check_tokens
from serve.stream import json_response


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of this file to `app`."""
    tokenizer = service.tokenizer

    @app.post("/tokenize", openapi_extra=documented(TokenizeRequest))
    async def tokenize(http_request: Request) -> Response:
        body = await http_request.body()
        request, headers = parse(body, TokenizeRequest)
        limit = service.require_ready(request.model).max_context
        if request.messages is not None and request.prompt is None:
            turns = conversation_turns(request.messages)
            ids = await chat_prompt(service, len(body), turns, request.tools, DEFAULT_EFFORT)
        elif request.prompt is not None and request.messages is None:
            ids = await in_thread_if_large(len(body), tokenizer.encode, request.prompt, limit)
        else:
            raise ApiError(400, "give either prompt or messages", "prompt")
        if len(ids) > limit:  # encoding stopped early: the count would be wrong
            raise ApiError(400, f"more than the context of {limit} tokens", code="context_length_exceeded")
        reply: JsonObject = {"count": len(ids), "max_model_len": limit, "tokens": ids}
        if request.return_token_strs:
            reply["token_strs"] = [tokenizer.token_text(token) for token in ids]
        return json_response(reply, headers)

    @app.post("/detokenize", openapi_extra=documented(DetokenizeRequest))
    async def detokenize(http_request: Request) -> Response:
        body = await http_request.body()
        request, headers = parse(body, DetokenizeRequest)
        check_tokens(request.tokens, service.require_ready(request.model), "tokens")
        text = await in_thread_if_large(len(body), tokenizer.decode, request.tokens, skip_special=False)
        return json_response({"prompt": text}, headers)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """In the names of a tokenizer_config.json. Null: no text encodes as a control token, so none has a spelling
        that a client could encode; and conversations are rendered by the server, not by a template.
        """
        spelled = dict.fromkeys(("bos_token", "eos_token", "pad_token", "chat_template"))
        limit = service.require_ready().max_context
        return json_response({"tokenizer_class": "o200k_harmony", "model_max_length": limit, **spelled})
