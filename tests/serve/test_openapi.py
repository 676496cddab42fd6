"""GET /openapi.json: valid by OpenAPI 3.1, and what it says of each route is what the route does."""

import re

import pytest
from fastapi.openapi.models import OpenAPI
from jsonschema import Draft202012Validator
from starlette.routing import Route

from tests.fakes import FakeEngine
from tests.serve.conftest import MODEL

ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
USER = [{"role": "user", "content": "Hello"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
BODIES = {
    "/v1/completions": {"prompt": "Hello", "stop": ["x"], "logit_bias": {"5": 1.5}, "guided_json": {}},
    "/v1/chat/completions": {"messages": USER, "tools": [{"type": "function", "function": FUNCTION}], "n": 2},
    "/v1/messages": {"messages": USER, "max_tokens": 5, "system": [{"type": "text", "text": "x"}]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    "/v1/responses": {"input": [{"role": "user", "content": "x"}], "tools": [{"type": "custom", "name": "f"}]},
    "/v1/responses/input_tokens": {"input": "x", "instructions": "y"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1, 2]},
}


@pytest.fixture
def live(serve):
    return serve(FakeEngine([1, 2, 200002]))


def document(live) -> dict:
    return live.http.get("/openapi.json").json()


def schema_of(described: dict, content: dict) -> Draft202012Validator:
    """The validator of a JSON body; its references point into the document."""
    return Draft202012Validator({**content["application/json"]["schema"], "components": described["components"]})


def operations(described: dict) -> list[tuple[str, str, dict]]:
    return [(path, method, of) for path, item in described["paths"].items() for method, of in item.items()]


def references(value: object) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(references, value))
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        mapped = set(value["discriminator"]["mapping"].values()) if "discriminator" in value else set()
        return own.union(mapped, *map(references, value.values()))
    return set()


def test_the_document_is_valid(live):
    described = document(live)
    assert described["openapi"].startswith("3.1.")
    OpenAPI.model_validate(described)
    for name, schema in described["components"]["schemas"].items():
        assert re.fullmatch(r"[\w.-]+", name)
        Draft202012Validator.check_schema(schema)
    assert references(described)
    for reference in references(described):
        _, _, kind, name = reference.split("/")
        assert name in described["components"][kind]
    identifiers = [operation["operationId"] for _, _, operation in operations(described)]
    assert len(set(identifiers)) == len(identifiers)
    for path, _, operation in operations(described):
        parameters = operation.get("parameters", [])
        assert re.findall(r"{(\w+)}", path) == [entry["name"] for entry in parameters if entry["in"] == "path"]
        for parameter in parameters:
            Draft202012Validator.check_schema(parameter["schema"])


def test_every_route_is_described(live):
    routes = {
        (route.path_format, method.lower())
        for route in live.app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    described = operations(document(live))
    assert {(path, method) for path, method, _ in described} == routes
    assert all("requestBody" in of for path, method, of in described if method == "post" and "cancel" not in path)


def test_a_query_is_described(live):
    (_, *query) = document(live)["paths"]["/v1/responses/{id}/input_items"]["get"]["parameters"]
    assert [(entry["name"], entry["in"]) for entry in query] == [(n, "query") for n in ("after", "limit", "order")]
    assert query[2]["schema"]["enum"] == ["asc", "desc"]


def test_there_is_no_page_of_documentation(live):
    assert {live.http.get(path).status_code for path in ("/docs", "/redoc")} == {404}


@pytest.mark.parametrize("path", BODIES)
def test_what_the_document_allows_is_answered_and_what_it_forbids_is_refused(live, path):
    described = document(live)
    operation = described["paths"][path]["post"]
    schema = schema_of(described, operation["requestBody"]["content"])
    schema.validate(BODIES[path])
    answer = live.http.post(path, json=BODIES[path])
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] in operation["responses"]["200"]["content"]
    schema_of(described, operation["responses"]["200"]["content"]).validate(answer.json())
    for wrong in ({}, {**BODIES[path], "model": 5}, []):
        refused = live.http.post(path, json=wrong)
        assert refused.status_code == 400
        schema_of(described, operation["responses"]["default"]["content"]).validate(refused.json())
        if wrong != {} or path != "/tokenize":  # there either of two fields is needed
            assert not schema.is_valid(wrong)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_streams_media_type_is_described(live, path):
    answer = live.http.post(path, json={**BODIES[path], "stream": True})
    media = answer.headers["content-type"].partition(";")[0]
    assert media == "text/event-stream"
    assert document(live)["paths"][path]["post"]["responses"]["200"]["content"][media] == {}


def test_every_get_answers_as_described(live):
    id = live.http.post("/v1/responses", json={"input": "x"}).json()["id"]
    for path, method, operation in operations(document(live)):
        if method == "get":
            answer = live.http.get(path.format(name=MODEL, id=id))
            assert answer.headers["content-type"].partition(";")[0] in operation["responses"]["200"]["content"], path


def test_the_errors_have_the_shape_of_their_api(live):
    for path, _, operation in operations(document(live)):
        schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("/AnthropicError" if path in ANTHROPIC else "/Error")


def test_keys_are_described_where_they_are_needed(serve, live, tmp_path):
    assert document(live)["security"] == []
    (tmp_path / "keys").write_text("secret")
    guarded = serve(FakeEngine([1]), api_key_file=str(tmp_path / "keys"))
    described = guarded.http.get("/openapi.json", headers={"x-api-key": "secret"}).json()
    assert {name for entry in described["security"] for name in entry} == set(
        described["components"]["securitySchemes"]
    )
    for path, method, operation in operations(described):
        refused = guarded.http.request(method, path.format(name="x", id="x"), json={}).status_code == 401
        assert refused == (operation.get("security") != []), path
