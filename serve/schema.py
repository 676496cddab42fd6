"""Functions as harmony describes them to the model: JSON schemas to TypeScript-like types.

Where OpenAI's library tells a schema whole, the text is the library's, byte for byte (its odd indents included): models
were trained on it. Knows nothing of tokens: the text is encoded by the caller.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_DEPTH = 64  # of schemas in schemas
_BUDGET = 500_000  # of characters and keys, counted again at each level: what a bomb of references may cost
_LINE_BREAK = re.compile(r"\r\n|[\n\r\u2028\u2029]")
_PLAIN_NAME = re.compile(r"[\w$.-]+")
_STRUCTURE = {"properties", "items", "prefixItems"}  # told also where a schema has variants
_NAMES = {"integer": "number"} | {name: name for name in ("string", "number", "boolean", "null")}


class SchemaError(ValueError):
    """A schema that cannot be described; `place` is where it stands in a chat request."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place, self.problem = place, problem


class _Type(NamedTuple):
    text: str
    union: bool = False  # needs parentheses before []


def describe(functions: Iterable[tuple[str, str, Mapping[str, object] | None]]) -> str:
    """The text for the developer message, of functions as (name, description, parameters).

    Raises SchemaError.
    """
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    budget = [_BUDGET]
    for i, (name, description, parameters) in enumerate(functions):
        if description:
            lines += [f"// {line}" for line in _LINE_BREAK.split(description.removesuffix("\n"))]
        if parameters is None:
            lines += [f"type {name} = () => any;", ""]
        else:
            place = f"tools[{i}].function.parameters"
            schema = parameters
            if not schema.keys() & {"type", "$ref", "allOf", "anyOf", "oneOf"}:
                schema = {**schema, "type": "object"}  # parameters are always an object
            try:
                text = _Writer(parameters, budget).type(schema, place, "", ()).text
            except RecursionError:
                raise SchemaError(place, "nested too deeply") from None
            lines += [f"type {name} = (_: {text}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


class _Writer:
    """Writes the types of one function; `root` is what its references point into."""

    def __init__(self, root: Mapping[str, object], budget: list[int]) -> None:
        self._root, self._budget = root, budget

    def type(self, schema: object, place: str, indent: str, references: tuple[str, ...], depth: int = 0) -> _Type:
        """`references`: those being followed; one that comes again is cut and only named."""
        if isinstance(schema, bool):
            return _Type("any" if schema else "never")
        if not isinstance(schema, Mapping):
            raise SchemaError(place, "a schema must be an object or a boolean")
        if depth > _DEPTH:
            raise SchemaError(place, f"schemas are nested more than {_DEPTH} deep")
        schema, references, cut = self._resolve(schema, place, references)
        result = _Type(cut) if cut else self._plain(schema, place, indent, references, depth)
        if schema.get("nullable") is True and not re.search(r"(^|\| )null$", result.text):
            result = _Type(f"{result.text} | null", union=True)
        self._spend(len(result.text), place)
        return result

    def _spend(self, amount: int, place: str) -> None:
        self._budget[0] -= amount
        if self._budget[0] < 0:
            raise SchemaError(place, "with its references followed the schema is too large")

    def _resolve(
        self, schema: Mapping[str, object], place: str, references: tuple[str, ...]
    ) -> tuple[Mapping[str, object], tuple[str, ...], str]:
        """The schema without $ref and allOf, the references followed, and the name where one was cut.

        Of several anyOf or oneOf that all hold, the first stays where it is; the others are a list at the key "&".
        """
        while "$ref" in schema or "allOf" in schema:
            self._spend(10 + len(schema), place)
            rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
            parts: list[tuple[object, str, tuple[str, ...]]] = []  # schema, its place, references being followed there
            if "$ref" in schema:
                reference = schema["$ref"]
                target = self._target(reference, place)
                assert isinstance(reference, str)
                if reference in references:
                    return rest, references, re.sub(r"\W", "_", reference.rpartition("/")[2]) or "any"
                parts.append((target, f"{place}.$ref", (*references, reference)))
            if "allOf" in schema:
                given = _schemas(schema, "allOf", place)
                parts += [(part, f"{place}.allOf[{i}]", references) for i, part in enumerate(given)]
            merged: dict[str, object] = {}
            for part, where, followed in parts:
                if part is True:
                    continue
                if not isinstance(part, Mapping):
                    raise SchemaError(where, "a schema must be an object")
                if ("$ref" in part or "allOf" in part) and len(parts) > 1:
                    part, followed, cut = self._resolve(part, where, followed)
                    if cut:
                        return rest, followed, cut
                references = tuple(dict.fromkeys((*references, *followed)))
                self._merge(merged, part, where)
            self._merge(merged, rest, place)
            schema = merged
        self._spend(10 + len(schema), place)
        return schema, references, ""

    def _merge(self, merged: dict[str, object], part: Mapping[str, object], place: str) -> None:
        """Add to `merged` what a schema of the same value demands; where both name a key, the later one holds."""
        self._spend(1 + len(part), place)
        for key, value in part.items():
            old = merged.get(key)
            if key == "properties" and isinstance(old, Mapping) and isinstance(value, Mapping):
                self._spend(len(old) + len(value), place)
                both = {name: self._both(old[name], value[name], place) for name in value if name in old}
                merged[key] = {**old, **value, **both}
            elif key in ("required", "&") and isinstance(old, list) and isinstance(value, list):
                self._spend(len(old) + len(value), place)
                merged[key] = [*old, *value]
            elif key in ("anyOf", "oneOf") and old is not None and old is not value:
                self._merge(merged, {"&": [{key: value}]}, place)
            else:
                merged[key] = value

    def _both(self, first: object, second: object, place: str) -> object:
        """The schema of a value that two schemas describe."""
        if first is second:
            return first
        earlier = _list(first["allOf"]) if isinstance(first, Mapping) and first.keys() == {"allOf"} else [first]
        self._spend(len(earlier), place)
        return {"allOf": [*earlier, second]}

    def _target(self, reference: object, place: str) -> object:
        target: object = self._root
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise SchemaError(
                f"{place}.$ref", f"got {reference!r}, allowed: a place in the same schema, as #/$defs/Name"
            )
        for key in reference.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, Mapping) and key in target:
                target = target[key]
            else:
                raise SchemaError(f"{place}.$ref", f"{reference!r} points at nothing")
        return target

    def _plain(
        self, schema: Mapping[str, object], place: str, indent: str, references: tuple[str, ...], depth: int
    ) -> _Type:
        if "const" in schema:
            return _Type(_json(schema["const"]))
        if "enum" in schema:
            values = schema["enum"]
            if not isinstance(values, list) or not values:
                raise SchemaError(f"{place}.enum", "must be a list of values")
            return _Type(" | ".join(map(_json, values)), len(values) > 1)
        unions = []
        for key in ("oneOf", "anyOf"):
            if key in schema:
                variants = [
                    self.type(variant, f"{place}.{key}[{i}]", indent, references, depth + 1)
                    for i, variant in enumerate(_schemas(schema, key, place))
                ]
                texts = dict.fromkeys(variant.text for variant in variants)
                unions.append(_Type(" | ".join(texts), len(texts) > 1 or variants[0].union))
        unions += [self.type(one, place, indent, references, depth + 1) for one in _list(schema.get("&"))]
        told = [union for union in dict.fromkeys(unions) if union.text != "any"]
        if not told or schema.keys() & _STRUCTURE:
            told.insert(0, self._structure(schema, place, indent, references, depth))
        if len(told) == 1:
            return told[0]
        return _Type(" & ".join(f"({one.text})" if one.union else one.text for one in told), union=True)

    def _structure(
        self, schema: Mapping[str, object], place: str, indent: str, references: tuple[str, ...], depth: int
    ) -> _Type:
        """What the schema says by its `type` and what belongs to it."""
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            texts: list[str] = []
            for one in kind:
                texts.append(self._structure({**schema, "type": one}, place, indent, references, depth + 1).text)
                self._spend(10 + len(schema) + len(texts[-1]), place)
            return _Type(" | ".join(dict.fromkeys(texts)), len(set(texts)) > 1)
        if kind == "object" or (kind is None and schema.keys() & {"properties", "additionalProperties"}):
            return self._object(schema, place, indent, references, depth)
        if kind == "array" or (kind is None and schema.keys() & {"items", "prefixItems"}):
            if "prefixItems" in schema:
                items = [
                    self.type(item, f"{place}.prefixItems[{i}]", indent, references, depth + 1).text
                    for i, item in enumerate(_schemas(schema, "prefixItems", place))
                ]
                return _Type(f"[{', '.join(items)}]")
            if "items" not in schema:
                return _Type("Array<any>")
            item = self.type(schema["items"], f"{place}.items", indent, references, depth + 1)
            return _Type(f"({item.text})[]" if item.union else f"{item.text}[]")
        if kind is None:
            return _Type("any")
        if not isinstance(kind, str) or kind not in _NAMES:
            raise SchemaError(f"{place}.type", f"got {kind!r}, allowed: the types of JSON schema")
        return _Type(_NAMES[kind])

    def _object(
        self, schema: Mapping[str, object], place: str, indent: str, references: tuple[str, ...], depth: int
    ) -> _Type:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise SchemaError(f"{place}.properties", "must be an object")
        if not isinstance(required, list):
            raise SchemaError(f"{place}.required", "must be a list of names")
        names = {name for name in required if isinstance(name, str)}
        text = [_comment(schema.get("description"), indent), "{\n"]
        for name, value in properties.items():
            where = f"{place}.properties.{name}"
            mark = ":" if name in names else "?:"
            title = (name if _PLAIN_NAME.fullmatch(name) or re.fullmatch(r"[\w$. -]+", name) else _json(name)) + mark
            text.append(self._property(value, title, where, indent, references, depth))
        others = schema.get("additionalProperties")
        if isinstance(others, Mapping) and others:
            where = f"{place}.additionalProperties"
            text.append(
                f"{indent}[key: string]: {self.type(others, where, indent + '    ', references, depth + 1).text},\n"
            )
        return _Type("".join([*text, indent, "}"]))

    def _property(
        self, value: object, title: str, place: str, indent: str, references: tuple[str, ...], depth: int
    ) -> str:
        if not isinstance(value, Mapping):
            return f"{indent}{title} {self.type(value, place, indent + '    ', references, depth + 1).text},\n"
        shown, followed, cut = self._resolve(value, place, references)
        head = _comment(shown.get("title"), indent)
        head += f"{indent}//\n" if head else ""
        about = shown.get("description")
        default = ""
        if "default" in shown:
            bare = isinstance(shown["default"], str) and "enum" in shown
            default = f"// default: {_json(shown['default'])[1:-1] if bare else _json(shown['default'])}"
        variants = shown.get("oneOf")
        stacked = isinstance(variants, list) and bool(variants) and not cut
        stacked = stacked and not shown.keys() & {"const", "anyOf", "&", *_STRUCTURE}
        first = variants[0] if stacked and isinstance(variants, list) else None
        repeated = isinstance(first, Mapping) and isinstance(about, str) and first.get("description") == about
        examples = shown.get("examples")
        sample = ""
        if isinstance(examples, list) and examples:
            sample = f"{indent}// Examples:\n"
            sample += "".join(f"{indent}// - {_json(one)}\n" for one in examples if isinstance(one, str))
        if not stacked:
            head += _comment(about, indent) + sample
            kind = self.type(value, place, indent + "    ", references, depth + 1)
            return f"{head}{indent}{title} {kind.text},{' ' + default if default else ''}\n"
        assert isinstance(variants, list)
        above = "" if repeated else _comment(about, indent)
        text = [head, sample, above, f"{indent}{default}\n" if default else "", f"{indent}{title}\n"]
        for i, variant in enumerate(variants):
            kind = self.type(variant, f"{place}.oneOf[{i}]", indent + "   ", followed, depth + 1)
            notes = []
            if isinstance(variant, Mapping):
                note = variant.get("description")
                if isinstance(note, str) and note != about and not (i == 0 and above):
                    notes.append(" ".join(_LINE_BREAK.split(note)))
                if "default" in variant:
                    bare = isinstance(variant["default"], str) and "enum" in variant
                    notes.append("default: " + (_json(variant["default"])[1:-1] if bare else _json(variant["default"])))
            text.append(f"{indent} | {kind.text}{' // ' + ' '.join(notes) if notes else ''}\n")
        if shown.get("nullable") is True:
            text.append(f"{indent} | null\n")
        return "".join([*text, f"{indent},\n"])


def _schemas(schema: Mapping[str, object], key: str, place: str) -> list[object]:
    given = schema[key]
    if not isinstance(given, list) or not given:
        raise SchemaError(f"{place}.{key}", "must be a list of schemas")
    return given


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _comment(text: object, indent: str) -> str:
    return "".join(f"{indent}// {line}\n" for line in _LINE_BREAK.split(text)) if isinstance(text, str) else ""


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
