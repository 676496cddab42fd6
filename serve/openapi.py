"""The API's description for GET /openapi.json: an OpenAPI 3.1 document made of the routes and their request types.

Knows of a route its path, methods and docstring, and what `documented` says of it. What `parsing.normalise` accepts
beyond a request type is not in it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from serve.guard import needs_key
from serve.parsing import IGNORED_HEADER
from serve.protocol import JsonObject, is_anthropic

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
_COMPONENTS = "#/components/"
_NULLABLE = {"type": ["string", "null"]}
_HEADERS: JsonObject = {
    "x-request-id": {"description": "The request's own, or one that was made.", "schema": {"type": "string"}},
    IGNORED_HEADER: {
        "description": "The fields of the request that had no effect, if any.",
        "schema": {"type": "string"},
    },
}
# A stream of events has no schema: some readers take one for each event's, some for that of the whole text.
_CONTENT: dict[str, JsonObject] = {JSON: {"schema": {"type": "object"}}, TEXT: {"schema": {"type": "string"}}}
_SCHEMES: JsonObject = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def _object(properties: JsonObject) -> JsonObject:
    return {"type": "object", "properties": properties, "required": [*properties]}


# As `ApiError` writes them.
_ERRORS: JsonObject = {
    "Error": _object(
        {
            "error": _object(
                {"message": {"type": "string"}, "type": {"type": "string"}, "param": _NULLABLE, "code": _NULLABLE}
            )
        }
    ),
    "AnthropicError": _object(
        {"type": {"const": "error"}, "error": _object({"type": {"type": "string"}, "message": {"type": "string"}})}
    ),
}


def documented(
    request: type[msgspec.Struct] | None = None,
    answers: Sequence[str] = (JSON,),
    query: type[msgspec.Struct] | None = None,
) -> dict[str, Any]:
    """A route's `openapi_extra`: the type of its body, the media types of its answers, and the type of its query."""
    return {"request": request, "answers": answers, "query": query}


def document(routes: Iterable[BaseRoute], version: str, keys: bool) -> JsonObject:
    """The OpenAPI document of all `routes`. `keys`: whether the server demands an API key."""
    api_routes = [route for route in routes if isinstance(route, APIRoute)]
    extras = [route.openapi_extra or documented() for route in api_routes]
    requests = [extra["request"] for extra in extras if extra["request"]]
    references, schemas = msgspec.json.schema_components(
        requests, schema_hook=_any_value, ref_template=_COMPONENTS + "schemas/{name}"
    )
    reference_of = dict(zip(requests, references, strict=True))
    paths: dict[str, JsonObject] = {}
    for route, extra in zip(api_routes, extras, strict=True):
        operation: JsonObject = {"operationId": route.name}
        if route.description:
            operation["description"] = route.description
        parameters: list[JsonObject] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
        if extra["query"]:
            _, components = msgspec.json.schema_components([extra["query"]])
            properties = components[extra["query"].__name__]["properties"]
            parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]
        if parameters:
            operation["parameters"] = parameters
        if extra["request"]:
            content = {JSON: {"schema": reference_of[extra["request"]]}}
            operation["requestBody"] = {"required": True, "content": content}
        operation["responses"] = _responses(extra["answers"], "AnthropicError" if is_anthropic(route.path) else "Error")
        if keys and not needs_key(route.path):
            operation["security"] = []
        for method in route.methods or ():
            paths.setdefault(route.path_format, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mini-vllm",
            "version": version,
            "description": "Unknown fields are ignored and named in a header. HEAD is where GET is.",
        },
        "paths": paths,
        "components": {"schemas": schemas | _ERRORS, "headers": _HEADERS, "securitySchemes": _SCHEMES},
        "security": [{name: []} for name in _SCHEMES] if keys else [],
    }


def _any_value(_: type) -> JsonObject:
    """The schema of `object`; msgspec does not take an empty one."""
    return {"description": "any JSON value"}


def _responses(answers: Sequence[str], error: str) -> JsonObject:
    headers = {name: {"$ref": f"{_COMPONENTS}headers/{name}"} for name in _HEADERS}
    content = {media: _CONTENT.get(media, {}) for media in answers}
    refusal = {JSON: {"schema": {"$ref": f"{_COMPONENTS}schemas/{error}"}}}
    return {
        "200": {"description": "The answer.", "headers": headers, "content": content},
        "default": {"description": "A refusal or a failure.", "headers": headers, "content": refusal},
    }
