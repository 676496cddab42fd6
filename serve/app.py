"""The routes. Each names its path and hands over to the module that answers.

Holds no logic of its own beyond what a load balancer, a scraper or a debugging client asks.
"""

import datetime
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from conf.schema import ServerConfig
from engine.tokenizer import Tokenizer
from serve import chat, completions
from serve.client import Engine
from serve.generation import Service
from serve.guard import Guard, read_keys
from serve.metrics import Metrics
from serve.protocol import ApiError, DetokenizeRequest, TokenizeRequest, check_tokens, parse

CLIENT_GONE = 499  # nobody reads it; access logs know the number


def utc_today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def create_app(
    engine: Engine, server: ServerConfig, model_name: str, today: Callable[[], datetime.date] = utc_today
) -> FastAPI:
    """The ASGI application. Whoever runs it sets `app.state.draining` to True to have it refuse new requests.

    `today` is what prompts name as the current date. Raises OSError or ValueError for an unusable API key file.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.draining = False
    app.add_middleware(Guard, keys=read_keys(server.api_key_file), max_body_bytes=server.max_body_bytes)
    metrics = Metrics(engine, model_name)
    service = Service(engine, server, model_name, Tokenizer(), metrics, lambda: app.state.draining, today)
    created = int(time.time())

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        message = {404: f"there is no {where}", 405: f"{where} is not allowed"}.get(error.status_code, error.detail)
        said = ApiError(error.status_code, message)
        return Response(said.body(), error.status_code, error.headers, "application/json")

    def generate(path: str, create: Callable[..., Awaitable[Response | None]]) -> None:
        @app.post(path)
        async def route(request: Request) -> Response:
            answer = await create(service, await request.body(), request.receive)
            return answer or Response(status_code=CLIENT_GONE)

    generate("/v1/completions", completions.create)
    generate("/v1/chat/completions", chat.create)

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": model_name, "object": "model", "created": created, "owned_by": "mini-vllm"}
        if engine.ready:
            model["max_model_len"] = engine.ready.max_context
        return _json({"object": "list", "data": [model]})

    @app.get("/health")
    async def health() -> Response:
        if engine.failure is not None:
            raise ApiError(503, engine.failure, code="engine_failed")
        return _json({"status": "ok"})

    @app.get("/health/ready")
    async def ready() -> Response:
        service.accepting()
        return _json({"status": "ready"})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def show_version() -> Response:
        try:
            return _json({"version": version("mini-vllm")})
        except PackageNotFoundError:  # run from a source folder that was never installed
            return _json({"version": "source"})

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await request.body()
        asked, headers = parse(body, TokenizeRequest)
        limits = service.accepting(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if asked.messages is not None:
            ids = await chat.prompt_of(
                service, len(body), asked.messages, asked.tools, chat.DEFAULT_EFFORT, limits.max_context
            )
        else:
            ids = await service.encoded(len(body), service.tokenizer.encode, asked.prompt, limits.max_context)
        if len(ids) > limits.max_context:  # and encoding was given up
            raise ApiError(400, f"more than the context of {limits.max_context} tokens", code="context_length_exceeded")
        reply: dict[str, Any] = {"count": len(ids), "max_model_len": limits.max_context, "tokens": ids}
        if asked.return_token_strs:
            reply["token_strs"] = [service.tokenizer.token_text(token) for token in ids]
        return _json(reply, headers)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await request.body()
        asked, headers = parse(body, DetokenizeRequest)
        check_tokens(asked.tokens, service.accepting(asked.model), "tokens")
        text = await service.encoded(len(body), service.tokenizer.decode, asked.tokens, False)
        return _json({"prompt": text}, headers)

    return app


def _json(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=headers)
