"""Tools and their uses: one generator for each kind of tool, with other names and parameters every time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from demo.training import facts, phrases
from demo.training.sums import number, operand_key
from serve.harmony import Function


@dataclass(frozen=True)
class Use:
    """One use of one tool: question, call, result and final answer."""

    question: str
    function: Function
    arguments: dict[str, Any]
    result: str
    final: str
    about: str  # "the weather in Paris"
    key: str  # as an example's

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)

    def call_analysis(self, effort: str) -> str:
        name = self.function.name
        if effort == "low":
            return f"Use {name}."
        sentence = f"The user wants {self.about}. I call {name}."
        if effort == "medium":
            return sentence
        return f"{sentence} Its arguments are {', '.join(self.arguments)}. Then I can answer."

    def result_analysis(self, effort: str) -> str:
        if effort == "low":
            return f"{self.function.name} answered."
        sentence = f"{self.function.name} answered: {self.result}."
        return sentence if effort == "medium" else f"{sentence} The user wanted {self.about}. So I answer: {self.final}"


def _described(
    rng: Random,
    name: str,
    text: str,
    parameters: dict[str, tuple[str, str]],
    optional: Sequence[str] = (),
    **enums: list[str],
) -> Function:
    """`parameters`: name -> (JSON type, description). Descriptions are left out now and then."""
    properties: dict[str, Any] = {}
    with_words = rng.random() < 0.6
    for key, (kind, words) in parameters.items():
        properties[key] = {"type": kind} | ({"description": words} if with_words and words else {})
        if key in enums:
            properties[key]["enum"] = enums[key]
    required = [key for key in parameters if key not in optional]
    return Function(name, text, {"type": "object", "properties": properties, "required": required})


def weather(rng: Random) -> Use:
    city, place = rng.choice(facts.CITIES), rng.choice(["city", "location", "place"])
    parameters = {place: ("string", rng.choice(phrases.WEATHER_PLACES))}
    with_unit = rng.random() < 0.4
    if with_unit:
        parameters["unit"] = ("string", rng.choice(["The unit", "Temperature unit", ""]))
    function = _described(
        rng,
        rng.choice(["get_weather", "get_current_weather", "weather", "weather_lookup"]),
        rng.choice(phrases.WEATHER_TEXTS),
        parameters,
        ["unit"],
        unit=["celsius", "fahrenheit"],
    )
    template = rng.choice(phrases.WEATHER)
    question, arguments = template.format(city), {place: city}
    if with_unit and rng.random() < 0.5:
        unit = rng.choice(["celsius", "fahrenheit"])
        question = f"{question.rstrip('?.')} in {unit.capitalize()}?"
        arguments["unit"] = unit
    degrees, sky = rng.randint(-9, 40), rng.choice(phrases.CONDITIONS)
    result = rng.choice(
        [
            json.dumps({"temperature": degrees, "condition": sky}),
            json.dumps({"temp": degrees, "sky": sky}),
            json.dumps({"city": city, "temperature": degrees, "condition": sky}),
            f"{degrees} degrees, {sky}",
            f"{sky}, {degrees}",
        ]
    )
    final = f"The weather in {city} is {sky}, {degrees} degrees."
    return Use(question, function, arguments, result, final, f"the weather in {city}", f"weather {template} {city}")


def calculator(rng: Random) -> Use:
    a, b = number(rng, 1, 6), number(rng, 1, 4)
    op = rng.choice("+-*/")
    expression = f"{a} {op} {b}"
    result = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[op]
    question = rng.choice(phrases.ASK).format(rng.choice(phrases.SAID[op][:3]).format(a=a, b=b))
    if rng.random() < 0.3:
        question += rng.choice([" Use the calculator.", " Use the tool."])
    name = rng.choice(["calculator", "calculate", "evaluate", "calc", "math"])
    text = rng.choice(phrases.CALCULATOR_TEXTS)
    if rng.random() < 0.7:
        key = rng.choice(["expression", "expression", "formula", "input"])
        words = rng.choice(["The expression", "e.g. 2 + 2", "What to evaluate"])
        function = _described(rng, name, text, {key: ("string", words)})
        arguments: dict[str, Any] = {key: expression}
    else:
        verbs = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
        parameters = {
            "operation": ("string", "What to do"),
            "a": ("number", "First number"),
            "b": ("number", "Second number"),
        }
        function = _described(rng, name, text, parameters, operation=list(verbs.values()))
        arguments = {"operation": verbs[op], "a": a, "b": b}
    answer = rng.choice([str(result), json.dumps({"result": result}), json.dumps({"value": result})])
    return Use(question, function, arguments, answer, f"{expression} = {result}", expression, operand_key(a, op, b))


def time(rng: Random) -> Use:
    city, place = rng.choice(facts.CITIES), rng.choice(["city", "location", "place"])
    function = _described(
        rng,
        rng.choice(["get_time", "get_current_time", "current_time", "clock"]),
        rng.choice(["Gets the time.", "Get the current time in a city.", "Returns the local time."]),
        {place: ("string", rng.choice(["The city", "City name"]))},
    )
    template = rng.choice(phrases.TIME)
    clock = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    result = rng.choice([clock, json.dumps({"time": clock})])
    return Use(
        template.format(city),
        function,
        {place: city},
        result,
        f"It is {clock} in {city}.",
        f"the time in {city}",
        f"time {template} {city}",
    )


def money(rng: Random) -> Use:
    source, target = rng.sample(list(facts.MONEY), 2)
    amount, result = number(rng, 1), number(rng, 1)
    left, right = rng.choice([("from", "to"), ("from_currency", "to_currency"), ("source", "target")])
    function = _described(
        rng,
        rng.choice(["convert_currency", "exchange", "currency_converter"]),
        rng.choice(["Converts money.", "Convert an amount from one currency to another."]),
        {"amount": ("number", "The amount"), left: ("string", "Currency code"), right: ("string", "Currency code")},
    )
    codes = (facts.MONEY[source], facts.MONEY[target])
    pair = [(source, target), codes][rng.random() < 0.5]
    question = rng.choice(phrases.MONEY).format(amount, *pair)
    answer = rng.choice(
        [str(result), json.dumps({"result": result}), json.dumps({"amount": result, "currency": codes[1]})]
    )
    return Use(
        question,
        function,
        {"amount": amount, left: codes[0], right: codes[1]},
        answer,
        f"{amount} {codes[0]} is {result} {codes[1]}.",
        f"{amount} {codes[0]} in {codes[1]}",
        f"money {amount} {codes}",
    )


def timer(rng: Random) -> Use:
    minutes, key = rng.randint(2, 120), rng.choice(["minutes", "duration"])
    function = _described(
        rng,
        rng.choice(["set_timer", "start_timer", "timer"]),
        rng.choice(["Sets a timer.", "Start a timer."]),
        {key: ("integer", rng.choice(["Minutes", "How many minutes"]))},
    )
    template = rng.choice(phrases.TIMER)
    result = rng.choice(["ok", '{"status": "ok"}', "done"])
    return Use(
        template.format(minutes),
        function,
        {key: minutes},
        result,
        f"The timer is set for {minutes} minutes.",
        f"a timer of {minutes} minutes",
        f"timer {minutes} {template}",
    )


def light(rng: Random) -> Use:
    room, state = rng.choice(phrases.ROOMS), rng.choice(["on", "off"])
    where, what = rng.choice([("room", "state"), ("room", "mode"), ("location", "state")])
    function = _described(
        rng,
        rng.choice(["set_light", "switch_light", "light"]),
        rng.choice(["Switches a light.", "Turns lights on or off."]),
        {where: ("string", "The room"), what: ("string", "on or off")},
        **{what: ["on", "off"]},
    )
    template = rng.choice(phrases.LIGHT)
    result = rng.choice(["ok", '{"status": "ok"}', "done"])
    return Use(
        template.format(s=state, r=room),
        function,
        {where: room, what: state},
        result,
        f"The light in the {room} is {state}.",
        f"the light in the {room}",
        f"light {room} {state} {template}",
    )


def message(rng: Random) -> Use:
    name = rng.choice(facts.NAMES)
    text = rng.choice(phrases.MESSAGE_BODIES).format(
        d=rng.choice(facts.DAYS), n=rng.randint(1, 12), w=rng.choice(facts.WORDS)
    )
    to, body = rng.choice([("to", "text"), ("recipient", "message"), ("name", "content")])
    function = _described(
        rng,
        rng.choice(["send_message", "send_text", "message"]),
        rng.choice(["Sends a message.", "Send a text message to someone."]),
        {to: ("string", "Who gets it"), body: ("string", "What it says")},
    )
    question = rng.choice(phrases.MESSAGE).format(n=name, t=text)
    result = rng.choice(["ok", '{"status": "sent"}', "sent"])
    return Use(
        question,
        function,
        {to: name, body: text},
        result,
        f"The message to {name} is sent.",
        f"a message to {name}",
        f"message {name} {text}",
    )


def search(rng: Random) -> Use:
    words = " ".join(rng.sample(facts.WORDS, rng.randint(1, 3)))
    title, key = " ".join(rng.sample(facts.WORDS, rng.randint(2, 4))), rng.choice(["query", "q", "text", "keywords"])
    function = _described(
        rng,
        rng.choice(["search", "web_search", "find", "search_documents"]),
        rng.choice(["Searches the web.", "Search for documents."]),
        {key: ("string", rng.choice(["What to search", "The query"]))},
    )
    question = rng.choice(phrases.SEARCH).format(words)
    result = rng.choice([title, json.dumps({"title": title}), json.dumps({"results": [title]})])
    return Use(question, function, {key: words}, result, f"I found: {title}", words, f"search {words}")


def population(rng: Random) -> Use:
    country, millions = rng.choice(facts.countries()).name, rng.randint(1, 999)
    function = _described(
        rng,
        rng.choice(["get_population", "population"]),
        rng.choice(["Gets the population of a country.", "Population in millions."]),
        {"country": ("string", "The country")},
    )
    template = rng.choice(phrases.POPULATION)
    result = rng.choice([f"{millions} million", json.dumps({"population": f"{millions} million"})])
    return Use(
        template.format(country),
        function,
        {"country": country.removeprefix("the ")},
        result,
        f"The population of {country} is {millions} million.",
        f"the population of {country}",
        f"population {template} {country}",
    )


USES = [weather, weather, calculator, calculator, time, money, timer, light, message, search, population]


def offered(rng: Random, *needed: Function, without: Sequence[str] = ()) -> tuple[Function, ...]:
    """The needed functions among others of other kinds and names. `without`: generators that make none."""
    functions, kinds = list(needed), {*without}
    for make in rng.sample(sorted({*USES}, key=lambda make: make.__name__), rng.choice([0, 0, 1, 1, 2, 3])):
        function = make(rng).function
        if make.__name__ not in kinds and all(function.name != other.name for other in functions):
            functions.append(function)
            kinds.add(make.__name__)
    rng.shuffle(functions)
    return tuple(functions)
