"""GET of models, health, metrics, version and the API's description: what is served, and whether all is well."""

import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.responses import Response

from serve.generation import Service, require_model
from serve.openapi import TEXT, document, documented
from serve.protocol import ApiError, JsonObject
from serve.stream import json_response


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of this file to `app`."""
    created = int(time.time())

    def described(name: str) -> JsonObject:
        length = {"max_model_len": service.engine.ready.max_context} if service.engine.ready else {}
        return {"id": name, "object": "model", "created": created, "owned_by": "mini-vllm", **length}

    @cache  # made at the first request, once all routes are there
    def description() -> JsonObject:
        return document(app.routes, own_version(), service.server.api_key_file is not None)

    @app.get("/v1/models")
    async def models() -> Response:
        names = [service.model_name, *service.server.also_named]
        return json_response({"object": "list", "data": [described(name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        require_model(name, service.model_name, service.server)
        return json_response(described(name))

    @app.get("/health")
    async def health() -> Response:
        """Whether the process should go on: 503 once the engine has failed."""
        if service.engine.failure is not None:
            raise ApiError(503, service.engine.failure, code="engine_failed")
        return json_response({"status": "ok"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """Whether requests are accepted now."""
        service.require_ready()
        return json_response({"status": "ready"})

    @app.get("/metrics", openapi_extra=documented(answers=(TEXT,)))
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def server_version() -> Response:
        return json_response({"version": own_version()})

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(description())


def own_version() -> str:
    """The installed version."""
    try:
        return version("mini-vllm")
    except PackageNotFoundError:  # run from a source folder that was never installed
        return "source"
