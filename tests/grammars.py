"""Answers to grammars from random logits, and JSON schemas to hold them to: the hardest model there is."""

import random
from typing import Any

import numpy as np

from conf.limits import CALL, ENDOFTEXT, FIRST_SPECIAL, RETURN, VOCABULARY
from engine.grammar import Compiler, Constraint
from engine.tokenizer import Tokenizer
from graphs.plan import SamplingParams

ENDS = (RETURN, CALL, ENDOFTEXT)
# What brings a text of JSON to its end soon, the best first.
CLOSERS = [b'"', b"}", b"]", b",", b":", b"e", b"l", b"u", b"0", b"1", b"b", b"f"]

RECURSIVE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
HOSTILE: dict[str, Any] = {
    "recursive": RECURSIVE,
    "long enum": {"enum": [f'value {i} é\n"{"x" * (i % 7)}' for i in range(3000)]},
    "enum of all kinds": {"enum": ["a", 1, -2.5, None, True, {"b": [1, "c"]}, [], "\u20ac\U0001f600"]},
    "names that need escapes": {
        "type": "object",
        "properties": {'a "b"\\': {"const": "\n\t"}, "größe": {"const": "<|end|>"}, "": {"type": "null"}},
        "required": ['a "b"\\', "größe", ""],
        "additionalProperties": False,
    },
    "max length": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": r"^(\d{3}-)?[a-zé/]{1,9}(x|yz){2,3}$"},
    "unanchored pattern": {"type": "string", "pattern": "b+"},
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["day", "id"],
        "additionalProperties": False,
    },
    "bounded numbers": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 1000}, "minItems": 2},
    "a tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "number"}], "items": False},
    "anything": {},
    "many optional properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(40)},
        "required": ["p7", "p39"],
        "additionalProperties": False,
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
        ]
    },
}


def random_schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of the kinds that clients send."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "object", "array", "either"]
    kind = chance.choice(kinds if depth else kinds[:6])
    if kind == "string":
        length = chance.choice([None, 0, 1, 7, 40])
        return {"type": "string"} | ({} if length is None else {"maxLength": length, "minLength": length // 3})
    if kind == "integer":
        return {"type": "integer"} | chance.choice([{}, {"minimum": -5, "maximum": chance.randrange(999)}])
    if kind == "enum":
        values = ["a", "b c", 'd"e', "ü", "日本", 0, 1.5, None, False]
        return {"enum": chance.sample(values, chance.randint(1, len(values)))}
    if kind == "object":
        names = chance.sample(["a", "b", "name", "größe", "x y", "A-1"], chance.randint(0, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(chance, depth - 1) for name in names},
            "required": [name for name in names if chance.random() < 0.7],
            "additionalProperties": chance.random() < 0.2,
        }
    if kind == "array":
        low = chance.choice([0, 0, 1, 3])
        return {
            "type": "array",
            "items": random_schema(chance, depth - 1),
            "minItems": low,
            "maxItems": low + chance.randint(0, 3),
        }
    if kind == "either":
        return {"anyOf": [random_schema(chance, depth - 1) for _ in range(chance.randint(1, 3))]}
    return {"type": kind}


class Walker:
    """Draws answers. Every token that the grammar allows is equally likely, but for control tokens, which would else
    hardly ever come: where any is allowed, one of five draws takes one."""

    def __init__(self) -> None:
        self.compiler = Compiler()
        self._mask = np.zeros(-(-VOCABULARY // 32), np.int32)
        self._tokenizer = Tokenizer()
        self._closers = [self._tokenizer.encode(closer.decode())[0] for closer in CLOSERS]
        self._bytes = [token for token in range(FIRST_SPECIAL) if len(self._tokenizer.token_bytes(token)) == 1]

    def answer(self, grammar: str, seed: int, most: int = 300, **sampling: Any) -> list[int]:
        """Tokens of an answer: the last one ends it. After `most`, tokens are chosen that bring it to an end."""
        chance = random.Random(seed)
        parameters = SamplingParams(max_tokens=9999, seed=0, **sampling)
        constraint = Constraint(self.compiler.compile(grammar), parameters)
        tokens: list[int] = []
        while not (tokens and tokens[-1] in ENDS):
            assert len(tokens) < most + 3000, "it does not end"
            allowed = self.allowed(constraint)
            tokens.append(self._draw(allowed, chance) if len(tokens) < most else self._close(allowed, chance))
            constraint.accept(tokens[-1])
            assert not constraint.error, constraint.error
        return tokens

    def rest(self, grammar: str, text: str) -> str:
        """What completes the beginning of an answer, whatever the tokens that it was written in."""
        constraint = Constraint(self.compiler.compile(grammar), SamplingParams(max_tokens=9999, seed=0))
        for token in self._tokenizer.encode(text):
            constraint.accept(token)
            assert not constraint.error, f"{text!r} begins no answer: {constraint.error}"
        tokens: list[int] = []
        chance = random.Random(0)
        while not (tokens and tokens[-1] in ENDS):
            assert len(tokens) < 3000, "it does not end"
            tokens.append(self._close(self.allowed(constraint), chance))
            constraint.accept(tokens[-1])
            assert not constraint.error, constraint.error
        return self._tokenizer.decode(tokens, skip_special=True)

    def allowed(self, constraint: Constraint) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The ids of the tokens that may come next."""
        matcher, _ = constraint.item(0)
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        constraint.finish(self._mask)
        allowed = np.flatnonzero(np.unpackbits(self._mask.view(np.uint8), bitorder="little"))
        assert len(allowed), "nothing is allowed"
        return allowed

    @staticmethod
    def _draw(allowed: Any, chance: random.Random) -> int:
        first = int(np.searchsorted(allowed, FIRST_SPECIAL))
        control = allowed[first:] if first == 0 or chance.random() < 0.2 else []
        return int(chance.choice(control if len(control) else allowed[:first] if first else allowed))

    def _close(self, allowed: Any, chance: random.Random) -> int:
        if allowed[-1] >= FIRST_SPECIAL:
            return int(allowed[-1])
        bytes_ = allowed[np.isin(allowed, self._bytes)]
        if len(bytes_) and chance.random() < 0.3:  # an exponent, say, ends with none of the closers
            return int(chance.choice(bytes_))
        return next((token for token in self._closers if token in allowed), int(chance.choice(allowed)))
