"""What the model reads of a function's schema: the library's text where the library tells all, else ours."""

import enum
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Generic, Literal, TypeVar, Union

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
STRING, NULL = {"type": "string"}, {"type": "null"}
A = {"type": "object", "properties": {"a": STRING}}
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
        (
            {"$ref": "#/$defs/Both", "allOf": [{"properties": {"c": STRING}}]},
            "{\n    a?: string,\n    b?: string,\n    c?: string,\n    }",
        ),
        (
            {"allOf": [{"anyOf": [STRING, NULL]}, {"anyOf": [NULL, {"type": "integer"}]}]},
            "(string | null) & (null | number)",
        ),
        ({"allOf": [{"oneOf": [{"const": 1}, {"const": 2}]}] * 2 + [{"oneOf": [{"const": 3}]}]}, "(1 | 2) & 3"),
        ({"anyOf": [STRING, NULL], "allOf": [{"$ref": "#/$defs/Union"}]}, "(number | boolean) & (string | null)"),
        (
            {"type": "array", "items": {"allOf": [{"anyOf": [STRING, NULL]}, {"anyOf": [STRING]}]}},
            "((string | null) & string)[]",
        ),
        ({"type": "array", "items": {"anyOf": [{"enum": ["a", "b"]}]}}, '("a" | "b")[]'),
        ({"allOf": [{"properties": {"a": STRING}}, {"properties": {"a": {}}}]}, "{\n    a?: string,\n    }"),
        ({**A, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "{\n    a?: string,\n    }"),
        (
            {**A, "oneOf": [{"properties": {"b": STRING}}, NULL]},
            "{\n    a?: string,\n    } & ({\n    b?: string,\n    } | null)",
        ),
    ],
)
def test_a_schema_is_told_whole(schema, text):
    both = {"allOf": [A, {"properties": {"b": STRING}}]}
    union = {"anyOf": [{"type": "integer"}, {"type": "boolean"}]}
    defs = {"Color": {"enum": ["red", "green"]}, "Node": NODE, "Both": both, "Union": union}
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
    unions = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 8, "anyOf": [STRING]} for i in range(30)}
    for defs in (doubling | {"d30": STRING}, wide | {"d30": STRING}, unions | {"d30": STRING}):
        with pytest.raises(SchemaError):
            of_property({"$ref": "#/$defs/d0"}, **{"$defs": defs})
    for many in ('{"properties": {"a": {}}}', '{"anyOf": [{"type": "string"}]}'):
        with pytest.raises(SchemaError):
            of_property({"allOf": [json.loads(many) for _ in range(3000)]})
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


T = TypeVar("T")


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]
    rest: "Page[T] | None"


class Tree(pydantic.BaseModel, Generic[T]):
    """A tree."""

    value: T
    children: list["Tree[T]"] = []
    by_name: dict[str, "Tree[T]"]


class Color(enum.Enum):
    red = "red"
    quoted = 'a "b"'


class Level(enum.IntEnum):
    low = 1
    high = 10


def nested(fields: dict[str, Any]) -> type[pydantic.BaseModel]:
    return pydantic.create_model("Nested", **{name: (kind, ...) for name, kind in fields.items()})


FIELDS = st.recursive(
    st.sampled_from(
        [int, str, float, bool, None, Color, Level, Literal["a", "b\n"], Literal[1, None, True], Literal["one"]]
    ),
    lambda inner: st.one_of(
        inner.map(lambda t: list[t]),
        inner.map(lambda t: dict[str, t]),
        inner.map(lambda t: t | None if t is not None else t),
        st.tuples(inner, inner).map(lambda pair: tuple[pair]),
        st.tuples(inner, inner).map(lambda pair: Union[pair]),  # noqa: UP007
        inner.map(lambda t: Annotated[t, pydantic.Field(description="what it is")]),
        inner.map(lambda t: Page[t]),
        inner.map(lambda t: Tree[t]),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(nested),
    ),
    max_leaves=5,
)


def schemas(value: object) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from schemas(inner)


@given(st.dictionaries(st.sampled_from("abcdef"), FIELDS, min_size=1))
def test_every_model_of_pydantic_is_told_whole(fields):
    """No type is unknown, no property and no value is lost."""
    schema = json.loads(json.dumps(nested(fields).model_json_schema()))
    text = parameters(schema)
    assert "any" not in text
    for one in schemas(schema):
        for value in [*one.get("enum", []), *([one["const"]] if "const" in one else [])]:
            assert json.dumps(value) in text
        if isinstance(one.get("properties"), dict) and one.get("type") == "object":
            for name in one["properties"]:
                mark = ":" if name in one.get("required", []) else "?:"
                assert f"{name}{mark} " in text or f"{name}{mark}\n" in text
