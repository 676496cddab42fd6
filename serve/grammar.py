"""What an answer may be, as one grammar over all that the model generates: harmony's headers, and what they hold.

Reasoning is free text. What a client demands of the answer's form (a JSON schema, say) or of a call's arguments is a
`Form`; the headers around it are those that GPT-OSS writes, and all of them are read by `harmony.Parser`. Knows the
grammar language of llguidance (https://github.com/guidance-ai/llguidance), not who compiles it.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
from llguidance.gbnf_to_lark import gbnf_to_lark

from serve.harmony import FUNCTIONS
from serve.protocol import ApiError, JsonObject, ResponseFormat, SamplingRequest, unsupported

MAX_CHARACTERS = 512 * 1024  # of a grammar, schemas included
MAX_LARK = 64 * 1024  # characters of a client's own grammar
MAX_GBNF = 8 * 1024  # of one in GBNF, which is converted here, in a time that grows with the square
# Between JSON's tokens. Without a bound, a model that likes blanks never ends.
_WHITESPACE = r"[ \t\n\r]{1,64}"
_ANY_OBJECT: JsonObject = {"type": "object"}
_JSON_TYPE = '(" "? <|constrain|> "json" | " json")?'
_CALL_TYPE = '(" "? | " "? <|constrain|> "json" | " json")'
_NEXT = '<|end|> <|start|> "assistant"'


class Form(NamedTuple):
    """What a text must be."""

    grammar: JsonObject  # of llguidance: {"json_schema": …} or {"lark_grammar": …}
    place: str  # in the request, for errors

    @property
    def is_json(self) -> bool:
        return "json_schema" in self.grammar


class Offer(NamedTuple):
    """A function that the model is offered."""

    name: str
    parameters: Mapping[str, object] | None  # JSON schema
    is_strict: bool  # its calls are to be valid
    place: str  # of the schema in the request

    @property
    def arguments(self) -> Form:
        """What its arguments must be. Not strict, its schema is held to as far as it can be. Raises ApiError 400."""
        schema = dict(self.parameters or {"properties": {}})
        if not schema.keys() & {"type", "$ref", "allOf", "anyOf", "oneOf"}:
            schema["type"] = "object"  # parameters are always an object
        return json_form(schema, self.place, lenient=not self.is_strict)


class Grammar(NamedTuple):
    """A grammar, and the forms in it, which are compiled alone first so that an error names the form's place."""

    text: str
    forms: Sequence[Form]


def requested_form(request: SamplingRequest) -> Form | None:
    """What the text of the answer must be; None: anything. Raises ApiError 400."""
    forms = []
    if request.response_format:
        place = "response_format"
        form = response_form(request.response_format, place, f"{place}.json_schema.schema")
        forms += [form] if form else []
    if request.guided_json is not None:
        forms.append(json_form(_parsed(request.guided_json, "guided_json"), "guided_json"))
    if request.guided_regex is not None:
        forms.append(regex_form(request.guided_regex, "guided_regex"))
    if request.guided_choice is not None:
        forms.append(choice_form(request.guided_choice, "guided_choice"))
    if request.guided_grammar is not None:
        forms.append(user_form(request.guided_grammar, "guided_grammar"))
    if outputs := request.structured_outputs:
        place = "structured_outputs"
        if outputs.structural_tag is not None:
            raise unsupported(f"{place}.structural_tag is not supported", f"{place}.structural_tag")
        if outputs.json is not None:
            forms.append(json_form(_parsed(outputs.json, f"{place}.json"), f"{place}.json"))
        if outputs.json_object:
            forms.append(object_form(f"{place}.json_object"))
        if outputs.regex is not None:
            forms.append(regex_form(outputs.regex, f"{place}.regex"))
        if outputs.choice is not None:
            forms.append(choice_form(outputs.choice, f"{place}.choice"))
        if outputs.grammar is not None:
            forms.append(user_form(outputs.grammar, f"{place}.grammar"))
    if len(forms) > 1:
        places = " and ".join(form.place for form in forms)
        raise ApiError(400, f"{places}: got {len(forms)} forms of one answer, allowed: one", forms[1].place)
    return forms[0] if forms else None


def response_form(response_format: ResponseFormat, place: str, schema_place: str) -> Form | None:
    """The form that a response format names; None: any text. The places are its own and its schema's in the request.

    Raises ApiError 400.
    """
    if response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return object_form(place)
    if response_format.json_schema is None:
        raise ApiError(400, f"{place}.json_schema is needed: a name and a schema", f"{place}.json_schema")
    schema = response_format.json_schema.schema
    return json_form(True if schema is None else schema, schema_place)


def _parsed(schema: JsonObject | str, place: str) -> object:
    """A schema that may be given as a text. Raises ApiError 400."""
    try:
        return msgspec.json.decode(schema) if isinstance(schema, str) else schema
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"{place}: is not JSON: {error}", place) from None


def json_form(schema: object, place: str, lenient: bool = False) -> Form:
    """JSON of a schema. lenient: keywords that cannot be held to are left out, where they are refused otherwise.

    Raises ApiError 400.
    """
    if schema is False:
        raise ApiError(400, f"{place}: got false, which no value is valid for", place)
    if not isinstance(schema, dict | bool):
        raise ApiError(400, f"{place}: got {type(schema).__name__}, allowed: a JSON schema", place)
    options = {"whitespace_pattern": _WHITESPACE, "lenient": lenient}
    return Form({"json_schema": (schema if isinstance(schema, dict) else {}) | {"x-guidance": options}}, place)


def object_form(place: str) -> Form:
    """Any JSON object."""
    return json_form(_ANY_OBJECT, place)


def regex_form(regex: str, place: str) -> Form:
    """A text that a regular expression of Rust's crate `regex` matches as a whole."""
    return Form({"lark_grammar": f"start: BODY\nBODY: /(?:{_in_slashes(regex)})/"}, place)


def choice_form(choices: Sequence[str], place: str) -> Form:
    """One of some texts. Raises ApiError 400."""
    if not choices:
        raise ApiError(400, f"{place}: got no choice, allowed: at least one", place)
    literals = (re.sub(r"[^a-zA-Z0-9\u0080-\U0010ffff]", lambda c: f"\\x{ord(c[0]):02X}", text) for text in choices)
    return Form({"lark_grammar": f"start: BODY\nBODY: /(?:{'|'.join(dict.fromkeys(literals))})/"}, place)


def user_form(grammar: str, place: str) -> Form:
    """A grammar in the notation of Lark, or of GBNF. Raises ApiError 400."""
    is_gbnf = "::=" in grammar
    if len(grammar) > (most := MAX_GBNF if is_gbnf else MAX_LARK):
        raise ApiError(400, f"{place}: got {len(grammar)} characters, allowed: at most {most}", place)
    if "%llguidance" in grammar:
        raise ApiError(400, f"{place}: %llguidance is not allowed in it", place)
    try:
        return Form({"lark_grammar": gbnf_to_lark(grammar) if is_gbnf else grammar}, place)
    except Exception as error:  # the converter raises several kinds
        raise ApiError(400, f"{place}: {error}", place) from None


def _in_slashes(regex: str) -> str:
    """The same regular expression as it stands between slashes: a slash in it is escaped, once."""
    return re.sub(r"\\.|/|\n", lambda part: {"/": r"\/", "\n": r"\n"}.get(part[0], part[0]), regex, flags=re.DOTALL)


def text_grammar(form: Form) -> Grammar:
    """The whole generation is the text, as in /v1/completions."""
    return _joined("start: @body", {"body": form})


def chat_grammar(final: Form | None, functions: Sequence[Offer], demanded: Collection[str]) -> Grammar | None:
    """What follows the prompt of a conversation; None where nothing is demanded of it.

    final: the form of the answer. demanded: names of the functions of which one must be called, whose header stands in
    the prompt as `conversation.demanded_call` leaves it. Raises ApiError 400.
    """
    if demanded:
        return demanded_grammar([function for function in functions if function.name in demanded])
    if final or any(function.is_strict for function in functions):
        return answer_grammar(final, functions)
    return None


def answer_grammar(final: Form | None, functions: Sequence[Offer]) -> Grammar:
    """What follows `<|start|>assistant`: reasoning, then the final answer or a call of one of the functions.

    final: the form of the answer; None: any text, also before a call.
    """
    calls = [f"call_{i}" for i, _ in enumerate(functions)]
    before = "reasoning" if final else "(reasoning | preamble)"
    rules = [
        f"start: {before}* ({' | '.join(['final', *calls])})",
        f'reasoning: <|channel|> "analysis" <|message|> TEXT {_NEXT}',
        f'final: <|channel|> "final" {_JSON_TYPE if final is None or final.is_json else ""} <|message|> '
        f"{'@final' if final else 'TEXT'} <|return|>",
        "TEXT: /(.|\\n)*/",
    ]
    if not final:
        rules.append(f'preamble: <|channel|> "commentary" <|message|> TEXT {_NEXT}')
    for i, function in enumerate(functions):
        to = f"to={FUNCTIONS}{function.name}"
        channel_first = f"<|channel|> {json.dumps('commentary ' + to)}"
        recipient_first = f'{json.dumps(" " + to)} <|channel|> "commentary"'
        rules.append(
            f"call_{i}: ({channel_first} | {recipient_first}) {_CALL_TYPE} <|message|> @arguments_{i} <|call|>"
        )
    forms = {f"arguments_{i}": function.arguments for i, function in enumerate(functions)}
    return _joined("\n".join(rules), forms | ({"final": final} if final else {}))


def demanded_grammar(functions: Sequence[Offer]) -> Grammar:
    """What follows the header of a demanded call, as `conversation.demanded_call` leaves it: its arguments, after the
    rest of the header where there are several functions to choose from."""
    forms = {f"arguments_{i}": function.arguments for i, function in enumerate(functions)}
    if len(functions) == 1:
        return _joined("start: @arguments_0 <|call|>", forms)
    calls = (  # the header ends before the dot of FUNCTIONS
        f"{json.dumps('.' + function.name)} {_CALL_TYPE} <|message|> @arguments_{i} <|call|>"
        for i, function in enumerate(functions)
    )
    return _joined("start: " + " | ".join(calls), forms)


def _joined(rules: str, forms: Mapping[str, Form]) -> Grammar:
    """Raises ApiError 400 for one that is too large."""
    grammars = [{"name": "answer", "lark_grammar": rules}]
    text = json.dumps({"grammars": [*grammars, *({"name": name, **form.grammar} for name, form in forms.items())]})
    if len(text) > MAX_CHARACTERS:
        places = ", ".join(dict.fromkeys(form.place for form in forms.values()))
        message = f"{places}: a grammar of {len(text)} characters, allowed: at most {MAX_CHARACTERS}"
        raise ApiError(400, message, next(iter(forms.values())).place)
    return Grammar(text, list(forms.values()))
