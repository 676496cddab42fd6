"""What the model reads of a function's schema: the library's text where the library tells all, else ours."""

import json
import re
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_harmony import (
    Conversation,
    DeveloperContent,
    HarmonyEncodingName,
    Message,
    Role,
    ToolDescription,
    load_harmony_encoding,
)

from serve.schema import SchemaError, describe


def parameters(schema: dict[str, Any]) -> str:
    text = describe([("f", "", schema)])
    return text.partition("type f = (_: ")[2].rpartition(") => any;")[0]


def of_property(schema: dict[str, Any], **root: object) -> str:
    text = parameters({"type": "object", "properties": {"x": schema}, **root})
    return text.removeprefix("{\n").removesuffix(",\n}").removeprefix("x?: ")


ENCODING = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
STRING = {"type": "string"}
NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"anyOf": [STRING, {"type": "null"}]}, "string | null"),
        ({"$ref": "#/$defs/Color"}, '"red" | "green"'),
        ({"type": "array", "items": {"$ref": "#/$defs/Color"}}, '("red" | "green")[]'),
        ({"$ref": "#/$defs/Node"}, "{\n    next?: Node | null,\n    }"),
        ({"allOf": [{"$ref": "#/$defs/Color"}]}, '"red" | "green"'),
        ({"const": 3}, "3"),
        ({"anyOf": [{"const": "a"}, {"const": "b"}]}, '"a" | "b"'),
        ({"enum": [1, "a", None, True, 1.5]}, '1 | "a" | null | true | 1.5'),
        ({"type": "integer", "enum": [1, 2]}, "1 | 2"),
        ({"type": "string", "enum": ['say "a"', "b\nc"]}, r'"say \"a\"" | "b\nc"'),
        ({"type": ["string", "array"], "items": STRING}, "string | string[]"),
        ({"type": "array", "items": {**STRING, "nullable": True}}, "(string | null)[]"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "{\n    [key: string]: number,\n    }"),
        ({"prefixItems": [STRING, {"type": "integer"}]}, "[string, number]"),
    ],
)
def test_a_schema_is_told_whole(schema, text):
    defs = {"Color": {"enum": ["red", "green"]}, "Node": NODE}
    assert of_property(schema, **{"$defs": defs}) == text


def test_parameters_need_no_type():
    assert parameters({"properties": {"x": STRING}, "required": ["x"]}) == "{\nx: string,\n}"


def test_one_of_constants_tells_each():
    assert of_property({"oneOf": [{"const": 1}, {"const": 2}]}) == "x?:\n | 1\n | 2\n"


@given(text=st.text(max_size=30), schema=st.sampled_from([STRING, {"enum": ["a"]}, {"oneOf": [STRING]}]))
def test_no_text_of_a_client_leaves_its_comment(text, schema):
    def code(lines: str) -> list[str]:
        parts = [line.partition("//")[0].strip() for line in re.split("[\n\r\u2028\u2029]", lines)]
        return [part for part in parts if part]

    told = {"description": f"d\n{text}", "title": text, "default": text, "examples": [text]}
    assert code(parameters({"properties": {"x": schema | told}, "description": text})) == code(
        parameters({"properties": {"x": schema}})
    )


BAD = [
    ({"$ref": "#/$defs/Gone"}, ".properties.x.$ref"),
    ({"$ref": "http://elsewhere"}, ".properties.x.$ref"),
    ({"type": "text"}, ".properties.x.type"),
    ({"enum": []}, ".properties.x.enum"),
    ({"anyOf": 3}, ".properties.x.anyOf"),
    ({"items": {"properties": []}}, ".properties.x.items.properties"),
]


@pytest.mark.parametrize(("schema", "place"), BAD)
def test_what_cannot_be_described_is_refused_with_its_place(schema, place):
    with pytest.raises(SchemaError) as refusal:
        parameters({"type": "object", "properties": {"x": schema}})
    assert refusal.value.place == "tools[0].function.parameters" + place


def test_bombs_are_refused():
    doubling = {f"d{i}": {"properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "abcdefgh"}} for i in range(30)}
    wide = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 8} for i in range(30)}
    for defs in (doubling | {"d30": STRING}, wide | {"d30": STRING}):
        with pytest.raises(SchemaError):
            of_property({"$ref": "#/$defs/d0"}, **{"$defs": defs})
    deep: dict[str, Any] = STRING
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    with pytest.raises(SchemaError, match="deep"):
        of_property(deep)


# What the library tells whole: single-line comments, strings without escapes, no unions in arrays.
WORD = st.text("abc xyz", min_size=1, max_size=8).map(str.strip).filter(bool)
ABOUT = st.fixed_dictionaries({}, optional={"description": WORD, "title": WORD})
LEAF = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "number", "integer", "boolean", "array")]),
    st.just({"type": ["string", "null"]}),
    st.lists(WORD, min_size=1, max_size=3, unique=True).map(lambda words: {"type": "string", "enum": words}),
    st.just({"type": "string", "default": "a"}),
    st.just({"type": "integer", "nullable": True, "default": None}),
)


def objects(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from("abc"), of, max_size=3).map(
        lambda properties: {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
    )


def described(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(of, ABOUT).map(lambda pair: pair[0] | pair[1])


SCHEMAS = st.recursive(
    described(LEAF),
    lambda inner: described(
        objects(inner)
        | objects(inner).map(lambda items: {"type": "array", "items": items})
        | st.lists(described(LEAF), min_size=1, max_size=3).map(lambda variants: {"oneOf": variants})
    ),
    max_leaves=8,
)


@given(described(objects(SCHEMAS)), WORD)
def test_what_the_library_tells_whole_is_the_librarys_text(schema, description):
    tool = ToolDescription.new("f", description, parameters=schema)
    content = DeveloperContent.new().with_function_tools([tool])
    message = Message.from_role_and_content(Role.DEVELOPER, content)
    text = ENCODING.decode(ENCODING.render_conversation(Conversation.from_messages([message])))
    assert describe([("f", description, schema)]) == text.partition("<|message|>")[2].removesuffix("<|end|>")


FIELDS = st.recursive(
    st.sampled_from([int, str, float, bool, None]),
    lambda inner: (
        inner.map(lambda t: list[t])
        | inner.map(lambda t: dict[str, t])
        | inner.map(lambda t: t | None if t is not None else t)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(
            lambda fields: pydantic.create_model("Nested", **{name: (t, ...) for name, t in fields.items()})
        )
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from("abcdef"), FIELDS, min_size=1))
def test_every_model_of_pydantic_is_told_without_any(fields):
    model = pydantic.create_model("Model", **{name: (t, ...) for name, t in fields.items()})
    text = parameters(json.loads(json.dumps(model.model_json_schema())))
    assert "any" not in text
    assert all(f"\n{name}: " in text for name in fields)
