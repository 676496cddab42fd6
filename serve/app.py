"""The ASGI application: the endpoints, the objects they share, and the middleware before them. Holds no other logic."""

import datetime
from collections.abc import Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from conf.schema import ServerConfig
from engine.tokenizer import Tokenizer
from serve.client import Engine
from serve.compiler import GrammarChecker
from serve.endpoints import chat, completions, messages, responses, status, tokenize
from serve.generation import Service
from serve.guard import Guard, Keys
from serve.metrics import Metrics
from serve.parsing import IGNORED_HEADER
from serve.protocol import ApiError
from serve.workers import Workers


def utc_today() -> datetime.date:
    """The current date, the same wherever the server stands."""
    return datetime.datetime.now(datetime.UTC).date()


def create_app(
    engine: Engine,
    server: ServerConfig,
    model_name: str,
    workers: Workers,
    today: Callable[[], datetime.date] = utc_today,
) -> FastAPI:
    """The ASGI application. Its owner sets `app.state.draining` to True to have it refuse new requests, and
    calls `app.state.keys.read()` to have the API keys read again.

    `today` is the date that prompts name. Raises OSError or ValueError for an unusable API key file.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.draining = False
    app.state.keys = Keys(server.api_key_file)
    app.add_middleware(
        Guard,
        keys=app.state.keys,
        max_body_bytes=server.max_body_bytes,
        salt_by_key=server.salt_by_key,
        json_type=server.require_json_type,
    )
    if server.cors_origins:  # before the guard: a preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", IGNORED_HEADER, "retry-after"],
        )
    app.add_exception_handler(HTTPException, no_such_route)
    metrics = Metrics(engine, model_name)
    grammars = GrammarChecker()
    service = Service(
        engine, server, model_name, Tokenizer(), metrics, workers, grammars, lambda: app.state.draining, today
    )
    completions.add_routes(app, service)
    chat.add_routes(app, service)
    messages.add_routes(app, service)
    responses.add_routes(app, service)
    tokenize.add_routes(app, service)
    status.add_routes(app, service)
    return app


async def no_such_route(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, an unknown path or a wrong method, as the error object."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path}"
    message = {404: f"there is no {route}", 405: f"{route} is not allowed"}.get(error.status_code, error.detail)
    body = ApiError(error.status_code, message).body(request.url.path)
    return Response(body, error.status_code, error.headers, "application/json")
