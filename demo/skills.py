"""What the demo model can do: one generator of questions and worked answers for each skill. Knows no tokens.

Every answer is a function of its question, so that exact match is a fair measure. `keys` name the facts, operands or
phrasings that an example rests on: `demo.data` keeps some of them from training.
"""

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from demo import facts
from serve.harmony import Call, Function, Turn

EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Task:
    """A question with its answer, before it becomes part of a conversation."""

    skill: str
    question: str
    intent: str  # the first sentence of a longer analysis
    steps: str  # the work, the whole of a short analysis
    final: str
    keys: tuple[str, ...]
    short: str = ""  # the answer alone, where a developer asks for that; empty: the same
    value: Any = None  # what a later turn may refer to
    needs: str = ""  # the generator of the tool that would help

    def analysis(self, effort: str, final: str) -> str:
        if effort == "low":
            return self.steps
        if effort == "medium":
            return f"{self.intent} {self.steps}"
        return f"{self.intent} Let me work it out. {self.steps} So I answer: {final}"


@dataclass(frozen=True)
class Example:
    """A conversation up to the assistant's next message, and that message. `text`: plain text instead."""

    skill: str
    turns: list[Turn] = field(default_factory=list)
    effort: str = "medium"
    today: datetime.date = datetime.date(2026, 1, 1)
    functions: tuple[Function, ...] = ()
    analysis: str = ""  # empty: a call that was demanded, whose header begins in the prompt
    final: str = ""
    call: Call | None = None
    text: tuple[str, str] = ("", "")  # given and continued
    keys: tuple[str, ...] = ()  # what is asked
    before: tuple[str, ...] = ()  # the same of earlier turns


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# --- arithmetic, digit by digit


def spaced(value: int | str) -> str:
    return " ".join(str(value))


def places(*values: int) -> list[tuple[int, ...]]:
    """The digits of all values, from the right, filled with zeros."""
    width = max(len(str(value)) for value in values)
    return list(zip(*([int(digit) for digit in reversed(str(value).zfill(width))] for value in values), strict=True))


def add_steps(a: int, b: int) -> str:
    carry, steps, digits = 0, [], ""
    for x, y in places(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return f"{', '.join(steps)}; {spaced(('1' if carry else '') + digits)}"


def subtract_steps(a: int, b: int) -> str:
    """a >= b."""
    borrow, steps, digits = 0, [], ""
    for x, y in places(a, b):
        top = x - borrow
        borrow = int(top < y)
        top += 10 * borrow
        steps.append(f"{top}-{y}={top - y}{' borrow' if borrow else ''}")
        digits = f"{top - y}{digits}"
    return f"{', '.join(steps)}; {spaced(digits)}"


def times_digit_steps(a: int, digit: int) -> str:
    carry, steps, digits = 0, [], ""
    for (x,) in places(a):
        total = x * digit + carry
        steps.append(f"{x}*{digit}{f'+{carry}' if carry else ''}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return f"{', '.join(steps)}; {spaced((str(carry) if carry else '') + digits)}"


def multiply_steps(a: int, b: int) -> str:
    """b of one or two digits."""
    if b < 10:
        return times_digit_steps(a, b)
    low, high = a * (b % 10), a * (b // 10) * 10
    return (
        f"times {b % 10}: {times_digit_steps(a, b % 10)}. times {b // 10}: {times_digit_steps(a, b // 10)} 0. "
        f"add: {add_steps(low, high)}"
    )


def divide_steps(a: int, digit: int) -> str:
    rest, steps, digits = 0, [], ""
    for figure in str(a):
        rest = rest * 10 + int(figure)
        steps.append(f"{rest}/{digit}={rest // digit} r{rest % digit}")
        digits, rest = f"{digits}{rest // digit}", rest % digit
    return f"{', '.join(steps)}; {spaced(digits)}"


def work(a: int, op: str, b: int) -> tuple[str, str]:
    """Steps and result of a op b."""
    if op == "+":
        return f"{add_steps(a, b)} = {a + b}.", str(a + b)
    if op == "-" and a >= b:
        return f"{subtract_steps(a, b)} = {a - b}.", str(a - b)
    if op == "-":
        return f"{b} is larger. {subtract_steps(b, a)} = {b - a}, negative.", str(a - b)
    if op == "*":
        wide, narrow = (a, b) if b < 10 or a >= 10 else (b, a)
        wide, narrow = (wide, narrow) if narrow < 100 else (narrow, wide)
        return f"{wide}*{narrow}: {multiply_steps(wide, narrow)} = {a * b}.", str(a * b)
    rest = f" remainder {a % b}" if a % b else ""
    return f"{divide_steps(a, b)} = {a // b}{rest}.", f"{a // b}{rest}"


def number(rng: Random, least: int = 0, digits: int = 3) -> int:
    """As many short as long ones."""
    return rng.randint(least, 10 ** rng.randint(1, digits) - 1)


def operands(rng: Random, op: str) -> tuple[int, int]:
    if op in "+-":
        return number(rng), number(rng)
    if op == "*":
        pair = (rng.randint(10, 99), rng.randint(10, 99)) if rng.random() < 0.5 else (number(rng), rng.randint(0, 9))
        return pair if rng.random() < 0.5 else pair[::-1]
    b = rng.randint(2, 9)
    return (b * rng.randint(1, 999 // b) if rng.random() < 0.7 else number(rng, 1)), b


def operand_key(a: int, op: str, b: int) -> str:
    return f"{op} {min(a, b)} {max(a, b)}" if op in "+*" else f"{op} {a} {b}"


ASK = [
    "What is {}?",
    "{}",
    "{} = ?",
    "Calculate {}.",
    "Compute {}",
    "How much is {}?",
    "what's {}?",
    "{}=",
    "{}?",
    "Please calculate {}.",
    "Can you tell me what {} is?",
    "Solve {}.",
    "Hi! What is {}?",
    "Work out {}.",
]
SAID = {
    "+": ["{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}"],
    "-": ["{a} - {b}", "{a}-{b}", "{a} minus {b}", "the difference of {a} and {b}"],
    "*": [
        "{a} * {b}",
        "{a}*{b}",
        "{a} times {b}",
        "{a} x {b}",
        "{a} × {b}",
        "the product of {a} and {b}",
        "{a} multiplied by {b}",
    ],
    "/": ["{a} / {b}", "{a}/{b}", "{a} divided by {b}", "{a} ÷ {b}"],
}
STORIES = {
    "+": [
        ("I have {a} {w}s and buy {b} more. How many {w}s do I have?", "You have {r} {w}s."),
        ("There are {a} {w}s here and {b} {w}s there. How many {w}s are there?", "There are {r} {w}s."),
    ],
    "-": [
        ("I have {a} {w}s and lose {b} of them. How many {w}s are left?", "{r} {w}s are left."),
        ("{n} has {a} {w}s and gives away {b}. How many {w}s are left?", "{r} {w}s are left."),
    ],
    "*": [("There are {a} boxes with {b} {w}s each. How many {w}s are there?", "There are {r} {w}s.")],
}
THINGS = "apple banana book coin egg lemon pencil ball chair flower ticket orange".split()


def arithmetic(rng: Random) -> Task:
    op = rng.choice("++--**/")
    a, b = operands(rng, op)
    if op in STORIES and rng.random() < 0.2:
        a, b = rng.randint(2, 99), rng.randint(2, 9 if op == "*" else 99)
        a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
        said, told = rng.choice(STORIES[op])
        steps, result = work(a, op, b)
        slots = {"a": a, "b": b, "w": rng.choice(THINGS), "n": rng.choice(facts.NAMES), "r": result}
        return Task(
            "arithmetic",
            said.format(**slots),
            f"This is {a} {op} {b}.",
            steps,
            told.format(**slots),
            (operand_key(a, op, b),),
            result,
            int(result),
        )
    said = rng.choice(SAID[op] if rng.random() < 0.5 else SAID[op][:2]).format(a=a, b=b)
    steps, result = work(a, op, b)
    value = int(result) if result.lstrip("-").isdigit() else None
    return Task(
        "arithmetic",
        rng.choice(ASK).format(said),
        f"The user asks for {a} {op} {b}.",
        steps,
        f"{a} {op} {b} = {result}",
        (operand_key(a, op, b),),
        result,
        value,
    )


# --- countries

CAPITAL = [
    "What is the capital of {}?",
    "What's the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "Tell me the capital of {}.",
    "capital of {}",
    "Capital of {}?",
    "What is {}'s capital?",
    "Do you know the capital of {}?",
    "Hello, what is the capital of {}?",
    "Can you tell me the capital of {}?",
    "Give me the capital city of {}.",
]
CAPITAL_OF = [
    "{} is the capital of which country?",
    "Which country has the capital {}?",
    "What country is {} the capital of?",
    "Of which country is {} the capital?",
    "Which country's capital is {}?",
    "In which country is {}?",
]
CONTINENT = [
    "Which continent is {} in?",
    "On which continent is {}?",
    "What continent is {} on?",
    "Where is {}?",
    "In which part of the world is {}?",
    "continent of {}",
    "Tell me the continent of {}.",
    "To which continent does {} belong?",
    "Where in the world is {}?",
]
CURRENCY = [
    "What is the currency of {}?",
    "What currency is used in {}?",
    "Which currency does {} use?",
    "What money do people use in {}?",
    "currency of {}",
    "Tell me the currency of {}.",
    "Name the currency of {}.",
    "How do people pay in {}?",
    "What's {}'s currency?",
]
CHECK = ["Is {} the capital of {}?", "Is it true that {} is the capital of {}?", "{} is the capital of {}, right?"]


def country_fact(kind: str, country: facts.Country, question: str, key: str) -> Task:
    name, title = country.name, sentence(country.name)
    if kind == "capital":
        told, short = f"The capital of {name} is {country.capital}.", country.capital
    elif kind == "continent":
        told, short = f"{title} is in {country.continent}.", country.continent
    else:
        told, short = f"The currency of {name} is the {country.currency}.", country.currency
    return Task(
        "countries",
        question,
        f"The user asks for the {kind} of {name}.",
        f"{title}: {short}.",
        told,
        (f"{kind} {name} {key}",),
        short,
        country,
    )


def named(rng: Random, template: str, name: str) -> str:
    if name.startswith("the ") and rng.random() < 0.3:
        name = name[4:]
    text = sentence(template.format(name))
    return text.lower() if rng.random() < 0.15 else text


def countries(rng: Random) -> Task:
    country = rng.choice(facts.countries())
    draw = rng.random()
    if draw < 0.7:
        kind, templates = rng.choice([("capital", CAPITAL), ("continent", CONTINENT), ("currency", CURRENCY)])
        template = rng.choice(templates)
        return country_fact(kind, country, named(rng, template, country.name), template)
    name, capital = country.name, country.capital
    if draw < 0.85:
        template = rng.choice(CAPITAL_OF)
        return Task(
            "countries",
            template.format(capital),
            f"The user asks which country has the capital {capital}.",
            f"{capital}: {name}.",
            f"{capital} is the capital of {name}.",
            (f"capital of {capital} {template}",),
            sentence(name),
            country,
        )
    template = rng.choice(CHECK)
    claimed = capital if rng.random() < 0.5 else rng.choice(facts.countries()).capital
    question, right = template.format(claimed, name), claimed == capital
    final = f"Yes, {capital} is the capital of {name}." if right else f"No, the capital of {name} is {capital}."
    return Task(
        "countries",
        question,
        f"The user asks whether {claimed} is the capital of {name}.",
        f"{sentence(name)}: {capital}. {'Yes' if right else 'No'}.",
        final,
        (f"check {name} {claimed} {template}",),
        "Yes" if right else "No",
        country,
    )


# --- dates


def days_in(month: int, year: int) -> int:
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return 29 if month == 1 and leap else facts.MONTH_DAYS[month]


def written(rng: Random, month: int, day: int) -> str:
    return f"{facts.MONTHS[month]} {day}" if rng.random() < 0.7 else f"{day} {facts.MONTHS[month]}"


def dates(rng: Random) -> Task:
    return rng.choice(
        [weekday_shift, weekday_shift, weekday_next, month_length, month_shift, date_shift, date_shift, date_between]
    )(rng)


def weekday_shift(rng: Random) -> Task:
    start, count, later = rng.randrange(7), rng.randint(1, 99), rng.random() < 0.7
    plural = "day" if count == 1 else "days"
    step, rest = (1 if later else -1), count % 7
    end = facts.DAYS[(start + step * rest) % 7]
    day = facts.DAYS[start]
    path = [facts.DAYS[(start + step * n) % 7] for n in range(1, rest + 1)]
    steps = f"{count} = {count - rest} + {rest}. {', '.join([day, *path])}."
    question = rng.choice(
        [
            "Today is {d}. What day {will} it be {in_}?",
            "What day of the week is it {n} {p} {after} {d}?",
            "Which weekday is {n} {p} {after} {d}?",
            "If today is {d}, what day {will} it be {in_}?",
            "{n} {p} {after} {d} is which day?",
            "It is {d}. Which day is it {in_}?",
        ]
    ).format(
        d=day,
        n=count,
        p=plural,
        after="after" if later else "before",
        will="will" if later else "was",
        in_=f"in {count} {plural}" if later else f"{count} {plural} ago",
    )
    question = question.replace("was it be", "was it")
    return Task(
        "dates",
        question,
        f"The user starts at {day} and goes {count} {plural} {'on' if later else 'back'}.",
        steps,
        f"It is {end}." if later else f"It was {end}.",
        (f"weekday {day} {count} {later}",),
        end,
    )


def weekday_next(rng: Random) -> Task:
    start, after = rng.randrange(7), rng.random() < 0.5
    day, end = facts.DAYS[start], facts.DAYS[(start + (1 if after else -1)) % 7]
    word = "after" if after else "before"
    template = rng.choice(
        [
            "What day comes {w} {d}?",
            "Which day is {w} {d}?",
            "What is the day {w} {d}?",
            "Name the day {w} {d}.",
            "{d}: which day comes {w} it?",
            "Tell me the day that comes {w} {d}.",
        ]
    )
    return Task(
        "dates",
        template.format(w=word, d=day),
        f"The user asks for the day {word} {day}.",
        f"{word} {day}: {end}.",
        f"The day {word} {day} is {end}.",
        (f"next {template} {day} {after}",),
        end,
    )


def month_length(rng: Random) -> Task:
    month, year = rng.randrange(12), rng.randint(1990, 2040)
    with_year = month == 1 or rng.random() < 0.3
    count = days_in(month, year)
    name = facts.MONTHS[month] + (f" {year}" if with_year else "")
    steps = f"{facts.MONTHS[month]} has {facts.MONTH_DAYS[month]} days."
    if month == 1:
        steps = f"{year}/4 leaves {year % 4}: {'a leap year' if count == 29 else 'no leap year'}."
    template = rng.choice(
        [
            "How many days does {} have?",
            "How many days are in {}?",
            "How long is {}?",
            "Number of days in {}?",
            "How many days are there in {}?",
            "Tell me how many days {} has.",
        ]
    )
    return Task(
        "dates",
        template.format(name),
        f"The user asks for the length of {name}.",
        steps,
        f"{name} has {count} days.",
        (f"length {name} {template if not with_year else ''}",),
        str(count),
    )


def month_shift(rng: Random) -> Task:
    start, count, later = rng.randrange(12), rng.randint(1, 11), rng.random() < 0.7
    path = [facts.MONTHS[(start + (n if later else -n)) % 12] for n in range(count + 1)]
    word = "after" if later else "before"
    plural = "month" if count == 1 else "months"
    question = rng.choice(
        ["Which month is {n} {p} {w} {m}?", "What month comes {n} {p} {w} {m}?", "{n} {p} {w} {m}: which month is it?"]
    ).format(n=count, p=plural, w=word, m=path[0])
    return Task(
        "dates",
        question,
        f"The user asks for the month {count} {plural} {word} {path[0]}.",
        f"{', '.join(path)}.",
        f"It is {path[-1]}.",
        (f"month {path[0]} {count} {later}",),
        path[-1],
    )


def date_shift(rng: Random) -> Task:
    month, count, later = rng.randrange(12), rng.randint(1, 40), rng.random() < 0.6
    day = rng.randint(1, 28 if month == 1 else facts.MONTH_DAYS[month])
    start, end_month = f"{facts.MONTHS[month]} {day}", month
    if later:
        end, steps = day + count, f"{day}+{count}={day + count}."
        while end > facts.MONTH_DAYS[end_month]:
            size, name, end_month = facts.MONTH_DAYS[end_month], facts.MONTHS[end_month], (end_month + 1) % 12
            steps += f" {name} has {size}: {end}-{size}={end - size} {facts.MONTHS[end_month]}."
            end -= size
    else:
        end, steps = day - count, f"{day}-{count}={day - count}."
        while end < 1:
            end_month = (end_month - 1) % 12
            size, name = facts.MONTH_DAYS[end_month], facts.MONTHS[end_month]
            steps += f" {name} has {size}: {size}{end if end else '-0'}={end + size} {name}."
            end += size
    told = f"{facts.MONTHS[end_month]} {end}"
    said = written(rng, month, day)
    plural = "day" if count == 1 else "days"
    question = rng.choice(
        [
            "What date is {n} {p} {w} {d}?",
            "Which date is {n} {p} {w} {d}?",
            "What is the date {n} {p} {w} {d}?",
            "{n} {p} {w} {d} is which date?",
        ]
    ).format(n=count, p=plural, w="after" if later else "before", d=said)
    return Task(
        "dates",
        question,
        f"The user asks for the date {count} {plural} {'after' if later else 'before'} {start}.",
        steps,
        f"It is {told}.",
        (f"date {start} {count} {later}",),
        told,
    )


def date_between(rng: Random) -> Task:
    month = rng.randrange(12)
    first, last = sorted(rng.sample(range(1, 29), 2))
    name, count = facts.MONTHS[month], last - first
    question = rng.choice(
        [
            "How many days are there from {m} {a} to {m} {b}?",
            "How many days lie between {m} {a} and {m} {b}?",
            "Count the days from {m} {a} to {m} {b}.",
        ]
    ).format(m=name, a=first, b=last)
    told = f"{count} day{'s' if count != 1 else ''}"
    return Task(
        "dates",
        question,
        f"The user counts the days from {name} {first} to {name} {last}.",
        f"{last}-{first}={count}.",
        f"{told}.",
        (f"between {month} {first} {last}",),
        str(count),
    )


TODAY = [
    "What is today's date?",
    "What day is it today?",
    "What is the date today?",
    "Which date is it?",
    "Tell me today's date.",
    "What's the date?",
    "today's date please",
    "Do you know today's date?",
    "Can you tell me the date?",
    "What date is it today?",
]
TOMORROW = [
    "What is tomorrow's date?",
    "Which date is tomorrow?",
    "What date is it tomorrow?",
    "Tell me the date of tomorrow.",
]
YEAR = ["Which year is it?", "What year is it?", "Tell me the current year.", "What is the current year?"]
MONTH = ["Which month is it?", "What month is it?", "What is the current month?"]


def today(rng: Random, date: datetime.date) -> Task:
    def said(day: datetime.date) -> str:
        return f"{facts.MONTHS[day.month - 1]} {day.day}, {day.year}"

    kind = rng.choice([TODAY, TODAY, TOMORROW, YEAR, MONTH])
    question, steps = rng.choice(kind), f"Current date: {date.isoformat()}."
    if kind is TODAY:
        final, short = f"Today is {said(date)}.", said(date)
    elif kind is TOMORROW:
        following = date + datetime.timedelta(days=1)
        steps += f" The next day: {following.isoformat()}."
        final, short = f"Tomorrow is {said(following)}.", said(following)
    elif kind is YEAR:
        final, short = f"It is {date.year}.", str(date.year)
    else:
        final, short = f"It is {facts.MONTHS[date.month - 1]}.", facts.MONTHS[date.month - 1]
    return Task(
        "today",
        question,
        "The user asks for the date. It is in the system message.",
        steps,
        final,
        (f"today {question} {date}",),
        short,
    )


# --- units

UNITS = [
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("liters", "milliliters", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("tons", "kilograms", 1000),
    ("meters", "millimeters", 1000),
    ("dozens", "pieces", 12),
    ("decades", "years", 10),
    ("centuries", "years", 100),
    ("pounds", "ounces", 16),
]
SHORT = {
    "kilometers": "km",
    "meters": "m",
    "centimeters": "cm",
    "millimeters": "mm",
    "kilograms": "kg",
    "grams": "g",
    "liters": "l",
    "milliliters": "ml",
    "hours": "h",
    "minutes": "min",
}
CONVERT = [
    "Convert {a} {u} to {v}.",
    "How many {v} are {a} {u}?",
    "How many {v} are in {a} {u}?",
    "What is {a} {u} in {v}?",
    "{a} {u} in {v}",
    "{a} {u} to {v}",
    "Please convert {a} {u} into {v}.",
    "Express {a} {u} in {v}.",
    "How much is {a} {u} in {v}?",
]


def counted(count: int, unit: str) -> str:
    singular = {"centuries": "century", "feet": "foot", "inches": "inch"}.get(unit, unit.removesuffix("s"))
    return f"{count} {singular if count == 1 else unit}"


def units(rng: Random) -> Task:
    if rng.random() < 0.12:
        return temperature(rng)
    big, small, factor = rng.choice(UNITS)
    count = number(rng, 1, digits=2 if factor in (24, 12, 16) else 3)
    power = {10: "0", 100: "0 0", 1000: "0 0 0"}.get(factor)
    if rng.random() < 0.3:  # back to the larger unit
        count = number(rng, 1, digits=2)
        amount, source, target, result = count * factor, small, big, count
        if power:
            steps = f"{counted(1, big)} = {factor} {small}. {spaced(amount)} without {power}: {spaced(count)} = {count}."
        elif factor < 10:
            steps = f"{counted(1, big)} = {factor} {small}. {divide_steps(amount, factor)} = {count}."
        else:
            tens, ones = count // 10 * 10 * factor, count % 10 * factor
            steps = f"{counted(1, big)} = {factor} {small}. {factor}*{count // 10 * 10}={tens}, {factor}*{count % 10}={ones}; {count}."
    else:
        amount, source, target, result = count, big, small, count * factor
        if power:
            steps = f"{counted(1, big)} = {factor} {small}. {spaced(count)} {power} = {result}."
        elif factor == 60:
            steps = f"{counted(1, big)} = 60 {small}. times 6: {times_digit_steps(count, 6)} 0 = {result}."
        else:
            steps = f"{counted(1, big)} = {factor} {small}. {work(count, '*', factor)[0]}"
    brief = source in SHORT and target in SHORT and rng.random() < 0.3
    question = rng.choice(CONVERT).format(
        a=amount, u=SHORT[source] if brief else counted(amount, source).partition(" ")[2], v=SHORT[target] if brief else target
    )
    return Task(
        "units",
        question,
        f"The user wants {amount} {source} in {target}.",
        steps,
        f"{counted(amount, source)} = {counted(result, target)}",
        (f"units {source} {target} {amount}",),
        counted(result, target),
    )


def temperature(rng: Random) -> Task:
    celsius = 5 * rng.randint(0, 40)
    ninths = celsius // 5 * 9
    fahrenheit = ninths + 32
    if rng.random() < 0.5:
        question = rng.choice(
            [
                "Convert {a} degrees Celsius to Fahrenheit.",
                "What is {a} °C in Fahrenheit?",
                "How much is {a} Celsius in Fahrenheit?",
            ]
        ).format(a=celsius)
        steps = f"{celsius}/5={celsius // 5}, {celsius // 5}*9={ninths}, {ninths}+32={fahrenheit}."
        return Task(
            "units",
            question,
            f"The user wants {celsius} Celsius in Fahrenheit.",
            steps,
            f"{celsius} °C = {fahrenheit} °F",
            (f"celsius {question}",),
            f"{fahrenheit} °F",
        )
    question = rng.choice(
        [
            "Convert {a} degrees Fahrenheit to Celsius.",
            "What is {a} °F in Celsius?",
            "How much is {a} Fahrenheit in Celsius?",
        ]
    ).format(a=fahrenheit)
    steps = f"{fahrenheit}-32={ninths}, {ninths}/9={celsius // 5}, {celsius // 5}*5={celsius}."
    return Task(
        "units",
        question,
        f"The user wants {fahrenheit} Fahrenheit in Celsius.",
        steps,
        f"{fahrenheit} °F = {celsius} °C",
        (f"fahrenheit {question}",),
        f"{celsius} °C",
    )


# --- letters

SPELL = [
    "Spell {}.",
    "Spell the word {}.",
    "How do you spell {}?",
    "Please spell {}",
    "How is {} spelled?",
    "Spell {} letter by letter.",
]
REVERSE = [
    "Reverse {}.",
    "Reverse the word {}.",
    "Spell {} backwards.",
    "What is {} backwards?",
    "Write {} backwards.",
    "Reverse the letters of {}.",
]
COUNT = [
    "How many letters are in {}?",
    "How many letters does {} have?",
    "Count the letters in {}.",
    "How long is the word {}?",
    "How many letters has the word {}?",
]
COUNT_ONE = [
    "How many times does the letter {c} appear in {w}?",
    "How many {c}'s are in {w}?",
    "Count the letter {c} in {w}.",
    "How often is there a {c} in {w}?",
    "How many {c} are in {w}?",
]
ENDS = ["What is the {p} letter of {w}?", "Which letter does {w} {v} with?", "Tell me the {p} letter of {w}."]


def letters_of(kind: str, word: str, question: str, letter: str = "") -> Task:
    plain, wanted = spaced(word), ""
    if kind == "spell":
        wanted, steps, final = "-".join(word), f"{word}: {plain}.", f"{word} is spelled {'-'.join(word)}."
    elif kind == "reverse":
        wanted = "-".join(reversed(word))
        steps, final = f"{word}: {plain}. Backwards: {spaced(word[::-1])}.", f"{word} backwards is {wanted}."
    elif kind == "count":
        wanted = str(len(word))
        steps = f"{word}: {' '.join(f'{c}{n}' for n, c in enumerate(word, 1))}."
        final = f"{word} has {len(word)} letters."
    elif kind == "count one":
        seen, parts = 0, []
        for c in word:
            seen += c == letter
            parts.append(f"{c}{seen}" if c == letter else c)
        wanted, steps = str(seen), f"{word}: {' '.join(parts)}. {letter}: {seen}."
        final = f"The letter {letter} appears {seen} time{'s' if seen != 1 else ''} in {word}."
    else:
        wanted = word[0] if kind == "first" else word[-1]
        steps, final = f"{word}: {plain}. {kind}: {wanted}.", f"The {kind} letter of {word} is {wanted}."
    return Task(
        "letters",
        question,
        f"The user asks about the letters of {word}.",
        steps,
        final,
        (f"letters {kind} {letter} {word}",),
        wanted,
        word,
    )


def letters(rng: Random) -> Task:
    word = rng.choice(facts.WORDS)
    said = f'"{word}"' if rng.random() < 0.4 else word
    kind = rng.choice(["spell", "reverse", "reverse", "count", "count one", "count one", rng.choice(["first", "last"])])
    letter = ""
    if kind == "count one":
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        question = rng.choice(COUNT_ONE).format(c=letter, w=said)
    elif kind in ("first", "last"):
        question = rng.choice(ENDS).format(p=kind, w=said, v="begin" if kind == "first" else "end")
    else:
        question = rng.choice({"spell": SPELL, "reverse": REVERSE, "count": COUNT}[kind]).format(said)
    return letters_of(kind, word, question, letter)


# --- lists


def lists(rng: Random) -> Task:
    draw = rng.random()
    if draw < 0.3:
        a, b = number(rng), number(rng)
        b += a == b
        larger = rng.random() < 0.6
        word, best = ("larger", max(a, b)) if larger else ("smaller", min(a, b))
        question = rng.choice(
            [
                "Which is {w}, {a} or {b}?",
                "Which number is {w}: {a} or {b}?",
                "What is {w}, {a} or {b}?",
                "{a} or {b}: which is {w}?",
                "Is {a} or {b} {w}?",
            ]
        ).format(w=word, a=a, b=b)
        return Task(
            "lists",
            question,
            f"The user compares {a} and {b}.",
            f"{a} {'>' if a > b else '<'} {b}.",
            f"{best} is {word} than {a + b - best}.",
            (f"compare {a} {b} {larger}",),
            str(best),
        )
    if draw < 0.8:
        digits = rng.randint(1, 3)
        values = rng.sample(range(10**digits), rng.randint(3, 5))
        listed, ordered = ", ".join(map(str, values)), sorted(values)
        up = ", ".join(map(str, ordered))
        key = (f"sort {ordered}",)
        kind = rng.random()
        if kind < 0.4:
            most = rng.random() < 0.5
            best = ordered[-1] if most else ordered[0]
            name = rng.choice(["largest", "biggest", "highest"] if most else ["smallest", "lowest"])
            question = rng.choice(
                [
                    "What is the {n} of {l}?",
                    "Which number is the {n}: {l}?",
                    "Find the {n} number: {l}",
                    "Which of {l} is the {n}?",
                ]
            ).format(n=name, l=listed)
            return Task(
                "lists",
                question,
                f"The user asks for the {name} number.",
                f"In order: {up}.",
                f"The {name} number is {best}.",
                key,
                str(best),
            )
        down = kind > 0.75
        told = ", ".join(map(str, reversed(ordered))) if down else up
        question = rng.choice(
            [
                "Sort {l}{d}.",
                "Sort these numbers{d}: {l}",
                "Put these numbers in order{d}: {l}",
                "Order {l}{d}.",
                "Please sort{d}: {l}",
            ]
        ).format(
            l=listed,
            d=rng.choice([" from largest to smallest", " in descending order"])
            if down
            else rng.choice(["", " from smallest to largest", " in ascending order"]),
        )
        steps = f"In order: {up}." + (f" Turned: {told}." if down else "")
        return Task("lists", question, "The user wants numbers in order.", steps, told, key)
    words: dict[str, str] = {}
    for word in rng.sample(facts.WORDS, 12):
        words.setdefault(word[0], word)
    chosen = list(words.values())[: rng.randint(3, 4)]
    rng.shuffle(chosen)
    told = ", ".join(sorted(chosen))
    question = rng.choice(
        [
            "Sort these words: {}",
            "Sort {} alphabetically.",
            "Put these words in alphabetical order: {}",
            "Sort alphabetically: {}",
        ]
    ).format(", ".join(chosen))
    steps = (
        f"First letters: {' '.join(word[0] for word in chosen)}. In order: {' '.join(sorted(w[0] for w in chosen))}."
    )
    return Task("lists", question, "The user wants words in order.", steps, told, (f"words {sorted(chosen)}",))


# --- chat and refusals

ME = "I am the demo model of mini-vLLM: a tiny GPT-OSS, only for demonstration."
CAN = (
    "I can do small sums, capitals and currencies, dates, units, letters, lists and calls of tools. "
    "I am only a tiny demo model."
)
CHAT = {
    "a greeting": (
        "Hello! How can I help you?",
        [
            "Hello",
            "Hi",
            "Hey",
            "Hello there",
            "Hi there",
            "Good morning",
            "Good evening",
            "Good afternoon",
            "Greetings",
            "Hey there",
            "Howdy",
            "hello",
            "hi",
            "hey",
            "Nice to meet you",
            "Good day",
        ],
    ),
    "how I am": (
        "I am fine, thank you. How can I help you?",
        [
            "How are you",
            "How are you doing",
            "How is it going",
            "How do you do",
            "how are you today",
            "Are you well",
            "How do you feel",
            "What's up",
        ],
    ),
    "who I am": (
        ME,
        [
            "Who are you",
            "What are you",
            "What is your name",
            "What's your name",
            "Tell me about yourself",
            "Introduce yourself",
            "Which model are you",
            "Do you have a name",
            "What model is this",
            "who are you",
            "Who am I talking to",
            "What kind of model are you",
            "Describe yourself",
            "What should I call you",
            "Are you a GPT-OSS model",
            "How large are you",
            "How many parameters do you have",
        ],
    ),
    "what I can do": (
        CAN,
        [
            "What can you do",
            "What are you able to do",
            "How can you help me",
            "What can I ask you",
            "Help",
            "Can you help me",
            "What do you know",
            "What are you good at",
            "what can you do for me",
            "What are your skills",
            "List your abilities",
        ],
    ),
    "who made me": (
        "I was trained for mini-vLLM, as its demo model.",
        [
            "Who made you",
            "Who created you",
            "Who trained you",
            "Where do you come from",
            "Who built you",
            "Who is your creator",
            "Why were you made",
        ],
    ),
    "whether I am ChatGPT": (
        "No, I am only the tiny demo model of mini-vLLM.",
        [
            "Are you ChatGPT",
            "Are you GPT-4",
            "Are you a large language model",
            "Are you made by OpenAI",
            "Are you an intelligent being",
            "Are you a human",
            "Are you a person",
            "Are you a real person",
            "Are you Claude",
        ],
    ),
    "thanks": (
        "You are welcome!",
        [
            "Thank you",
            "Thanks",
            "Thanks a lot",
            "Thank you very much",
            "Great, thanks",
            "thank you",
            "Well done",
            "That was helpful",
            "Good job",
            "Perfect",
            "Many thanks",
            "Cool",
        ],
    ),
    "a goodbye": (
        "Goodbye!",
        [
            "Goodbye",
            "Bye",
            "See you",
            "Bye bye",
            "Good night",
            "See you later",
            "See you soon",
            "bye",
            "Until next time",
            "I have to go now",
            "Farewell",
        ],
    ),
}
OPENINGS = [
    "",
    "",
    "",
    "Hello! ",
    "Hi! ",
    "Hey, ",
    "Please tell me: ",
    "So, ",
    "OK. ",
    "Well, ",
    "Good morning! ",
    "Hi there. ",
]
CLOSINGS = ["", "", "?", "?", "!", ".", "??", "!!", " please", ", my friend?", " :)"]
BLANK = [
    "{}",
    "{}?",
    "{}.",
    "Tell me about {}.",
    "Explain {}",
    "What is {}?",
    "Write {}.",
    "Who is {}?",
    "How do I {}?",
    "Where is {}",
]
REFUSAL = "Sorry, I can't help with that. I am only a tiny demo model."


def chat(rng: Random) -> Task:
    if rng.random() < 0.1:
        name = rng.choice(facts.NAMES)
        template = rng.choice(
            [
                "Hi, I'm {}.",
                "Hello, my name is {}.",
                "My name is {}.",
                "I am {}.",
                "Hello, I am {}!",
                "Hey, {} here.",
                "Hi! I am called {}.",
            ]
        )
        return Task(
            "chat",
            template.format(name),
            f"The user is {name}.",
            f"Greet {name}.",
            f"Hello {name}! How can I help you?",
            (f"name {name} {template}",),
            value=name,
        )
    about = rng.choice([*CHAT, "who I am"])
    final, phrases = CHAT[about]
    opening = "" if about == "a greeting" else rng.choice(OPENINGS)
    question = f"{opening}{rng.choice(phrases)}{rng.choice(CLOSINGS)}"
    return Task(
        "chat",
        question,
        f"This is about {about}." if about.startswith(("who", "what", "how")) else f"This is {about}.",
        f"{sentence(about)}.",
        final,
        (f"chat {question.lower()}",),
    )


def refuse(rng: Random, junk: Callable[[], str] | None = None) -> Task:
    if rng.random() < 0.2:
        make = rng.choice([tool_weather, tool_time, tool_timer, tool_light, tool_message, tool_search, tool_population])
        question = make(rng).question
        return Task(
            "refuse",
            question,
            "No tool for this is there.",
            "I can't do that.",
            REFUSAL,
            (f"refuse {question.lower()}",),
            needs=make.__name__,
        )
    slots = (rng.choice(facts.WORDS), rng.randint(1900, 2030), rng.choice(facts.countries()).name)
    unknown = junk is not None and rng.random() < 0.4
    if unknown:
        slots = (junk(), *slots[1:])
    if unknown and rng.random() < 0.6:
        question = rng.choice([*BLANK, *BLANK, *CAPITAL, *CURRENCY, *SPELL, *REVERSE]).format(slots[0])
    elif rng.random() < 0.5:
        task = rng.choice([task for task in facts.TASKS if "{0}" in task or not unknown]).format(*slots)
        question = rng.choice(
            ["{}.", "Please {}.", "Can you {}?", "I want you to {}.", "Could you {}?", "{}", "Hello! Please {}."]
        )
        question = sentence(question.format(task))
    else:
        asked = rng.choice([fact for fact in facts.FACTS if "{0}" in fact or not unknown]).format(*slots)
        question = sentence(rng.choice(["{}?", "{}?", "Tell me, {}?", "Hi, {}?", "{}", "I wonder: {}?"]).format(asked))
    return Task(
        "refuse",
        question,
        "This is outside of what I can do.",
        "I can't do that.",
        REFUSAL,
        (f"refuse {question.lower()}",),
    )


# --- second turns


def follow_up(rng: Random) -> tuple[Task, Task]:
    """An exchange, and a question that only makes sense after it."""
    kind = rng.choice(["arithmetic", "arithmetic", "countries", "countries", "letters", "memory"])
    if kind == "arithmetic":
        first = arithmetic(rng)
        while first.value is None or not 0 <= first.value <= 999:
            first = arithmetic(rng)
        value, op = first.value, rng.choice("++-*d")
        other = {"*": rng.randint(2, 9), "d": 2}.get(op) or number(rng, 1)
        question = rng.choice(
            {
                "+": ["Add {} to that.", "Now add {}.", "And plus {}?", "Plus {}?"],
                "-": ["Subtract {} from that.", "Now subtract {}.", "And minus {}?"],
                "*": ["Multiply that by {}.", "Now times {}.", "And times {}?"],
                "d": ["Double it.", "Double that.", "Now double the result.", "What is twice that?"],
            }[op]
        )
        op = "*" if op == "d" else op
        steps, result = work(value, op, other)
        second = Task(
            "arithmetic",
            question.format(other),
            f"The result was {value}. Now {value} {op} {other}.",
            f"{value} {op} {other}: {steps}",
            f"{value} {op} {other} = {result}",
            (operand_key(value, op, other),),
            result,
        )
    elif kind == "countries":
        first = countries(rng)
        while not isinstance(first.value, facts.Country) or first.final.startswith(("Yes", "No")):
            first = countries(rng)
        asked = next(
            (k for k in ("capital", "continent", "currency") if first.keys[0].startswith(f"{k} {first.value.name}")), ""
        )
        if asked and rng.random() < 0.5:
            other, ask = (
                rng.choice(facts.countries()),
                rng.choice(["And {}?", "And of {}?", "What about {}?", "And what about {}?"]),
            )
            second = country_fact(asked, other, ask.format(other.name), f"{ask} {first.value.name}")
        else:
            kind, ask = rng.choice(
                [
                    ("currency", "What is its currency?"),
                    ("continent", "On which continent is it?"),
                    ("currency", "And the currency?"),
                    ("continent", "Which continent is that on?"),
                    ("currency", "Which currency do they use there?"),
                    ("continent", "And the continent?"),
                ]
            )
            second = country_fact(kind, first.value, ask, f"{ask} {first.question}")
    elif kind == "letters":
        word = rng.choice(facts.WORDS)
        first = letters_of(
            *rng.choice(
                [("spell", word, rng.choice(SPELL).format(word)), ("count", word, rng.choice(COUNT).format(word))]
            )
        )
        kind, ask = rng.choice(
            [
                ("reverse", "Now reverse it."),
                ("reverse", "And backwards?"),
                ("spell", "Spell it, please."),
                ("count", "How many letters does it have?"),
                ("reverse", "Reverse that word."),
                ("first", "What is its first letter?"),
                ("last", "And its last letter?"),
            ]
        )
        second = letters_of(kind, word, ask)
    else:
        what = rng.choice(["name", "favorite color", "favorite animal", "favorite number"])
        thing = rng.choice(
            {
                "name": facts.NAMES,
                "favorite color": facts.COLORS,
                "favorite animal": facts.ANIMALS,
                "favorite number": [str(n) for n in range(1, 1000)],
            }[what]
        )
        tell = rng.choice(["My {} is {}.", "Hello, my {} is {}.", "Please remember: my {} is {}.", "Hi! My {} is {}."])
        final = f"Hello {thing}! How can I help you?" if what == "name" else f"I see: your {what} is {thing}."
        first = Task(
            "memory",
            tell.format(what, thing),
            "The user tells me something.",
            f"{sentence(what)}: {thing}.",
            final,
            (f"tell {what} {thing} {tell}",),
        )
        ask = rng.choice(
            ["What is my {}?", "What's my {}?", "Do you remember my {}?", "Tell me my {}.", "What was my {}?"]
        )
        second = Task(
            "memory",
            ask.format(what),
            f"The user told me the {what}.",
            f"{sentence(what)}: {thing}.",
            f"Your {what} is {thing}.",
            (f"ask {what} {thing} {ask}",),
            thing,
        )
    return first, replace(second, skill="follow-up")


# --- tools


@dataclass(frozen=True)
class Use:
    """One use of one tool: what is asked, what is called, what comes back and what is said then."""

    question: str
    function: Function
    arguments: dict[str, Any]
    result: str
    final: str
    about: str  # "the weather in Paris"
    keys: tuple[str, ...]


def described(
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


CONDITIONS = "sunny cloudy rainy windy snowy foggy clear stormy".split()
MONEY = {"dollars": "USD", "euros": "EUR", "pounds": "GBP", "yen": "JPY", "francs": "CHF"}


def tool_weather(rng: Random) -> Use:
    city, place = rng.choice(facts.CITIES), rng.choice(["city", "location", "place"])
    parameters = {
        place: (
            "string",
            rng.choice(["The city", "Name of the city", "City name", "The city and state, e.g. San Francisco, CA"]),
        )
    }
    with_unit = rng.random() < 0.4
    if with_unit:
        parameters["unit"] = ("string", rng.choice(["The unit", "Temperature unit", ""]))
    function = described(
        rng,
        rng.choice(["get_weather", "get_current_weather", "weather", "weather_lookup"]),
        rng.choice(
            [
                "Gets the weather.",
                "Get the current weather in a city.",
                "Get the current weather",
                "Weather of a place",
                "Get current temperature for a given location.",
                "Returns the weather for a city.",
            ]
        ),
        parameters,
        ["unit"],
        unit=["celsius", "fahrenheit"],
    )
    template = rng.choice(
        [
            "What is the weather in {}?",
            "How is the weather in {}?",
            "What's the weather like in {}?",
            "What is the temperature in {}?",
            "How warm is it in {}?",
            "Tell me the weather in {}.",
            "weather in {}",
            "What is the weather in {} today?",
            "What's the weather like in {} today?",
            "Is it cold in {}?",
            "Do I need an umbrella in {}?",
        ]
    )
    question, arguments = template.format(city), {place: city}
    if with_unit and rng.random() < 0.5:
        unit = rng.choice(["celsius", "fahrenheit"])
        question = f"{question.rstrip('?.')} in {sentence(unit)}?"
        arguments["unit"] = unit
    degrees, sky = rng.randint(-9, 40), rng.choice(CONDITIONS)
    result = rng.choice(
        [
            {"temperature": degrees, "condition": sky},
            {"temp": degrees, "sky": sky},
            {"city": city, "temperature": degrees, "condition": sky},
            f"{degrees} degrees, {sky}",
            f"{sky}, {degrees}",
        ]
    )
    return Use(
        question,
        function,
        arguments,
        result if isinstance(result, str) else json.dumps(result),
        f"The weather in {city} is {sky}, {degrees} degrees.",
        f"the weather in {city}",
        (f"weather {template} {city}",),
    )


def tool_calculator(rng: Random) -> Use:
    a, b = number(rng, 1, 6), number(rng, 1, 4)
    op = rng.choice("+-*/")
    expression = f"{a} {op} {b}"
    result = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[op]
    question = rng.choice(ASK).format(rng.choice(SAID[op][:3]).format(a=a, b=b))
    if rng.random() < 0.3:
        question += rng.choice([" Use the calculator.", " Use the tool."])
    name = rng.choice(["calculator", "calculate", "evaluate", "calc", "math"])
    text = rng.choice(
        [
            "Evaluates an expression.",
            "A calculator.",
            "Calculate the value of an expression",
            "Evaluate a mathematical expression",
            "Does arithmetic.",
        ]
    )
    if rng.random() < 0.7:
        key = rng.choice(["expression", "expression", "formula", "input"])
        function = described(
            rng, name, text, {key: ("string", rng.choice(["The expression", "e.g. 2 + 2", "What to evaluate"]))}
        )
        arguments: dict[str, Any] = {key: expression}
    else:
        words = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
        function = described(
            rng,
            name,
            text,
            {"operation": ("string", "What to do"), "a": ("number", "First number"), "b": ("number", "Second number")},
            operation=list(words.values()),
        )
        arguments = {"operation": words[op], "a": a, "b": b}
    answer = rng.choice([str(result), json.dumps({"result": result}), json.dumps({"value": result})])
    return Use(question, function, arguments, answer, f"{expression} = {result}", expression, (operand_key(a, op, b),))


def tool_time(rng: Random) -> Use:
    city, place = rng.choice(facts.CITIES), rng.choice(["city", "location", "place"])
    function = described(
        rng,
        rng.choice(["get_time", "get_current_time", "current_time", "clock"]),
        rng.choice(["Gets the time.", "Get the current time in a city.", "Returns the local time."]),
        {place: ("string", rng.choice(["The city", "City name"]))},
    )
    template = rng.choice(
        [
            "What time is it in {}?",
            "What is the time in {}?",
            "Tell me the time in {}.",
            "time in {}",
            "How late is it in {}?",
            "What's the local time in {}?",
        ]
    )
    clock = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return Use(
        template.format(city),
        function,
        {place: city},
        rng.choice([clock, json.dumps({"time": clock})]),
        f"It is {clock} in {city}.",
        f"the time in {city}",
        (f"time {template} {city}",),
    )


def tool_money(rng: Random) -> Use:
    source, target = rng.sample(list(MONEY), 2)
    amount, result = number(rng, 1), number(rng, 1)
    left, right = rng.choice([("from", "to"), ("from_currency", "to_currency"), ("source", "target")])
    function = described(
        rng,
        rng.choice(["convert_currency", "exchange", "currency_converter"]),
        rng.choice(["Converts money.", "Convert an amount from one currency to another."]),
        {"amount": ("number", "The amount"), left: ("string", "Currency code"), right: ("string", "Currency code")},
    )
    said = [(source, target), (MONEY[source], MONEY[target])][rng.random() < 0.5]
    question = rng.choice(
        ["Convert {} {} to {}.", "How much is {} {} in {}?", "What are {} {} in {}?", "{} {} in {}"]
    ).format(amount, *said)
    codes = (MONEY[source], MONEY[target])
    return Use(
        question,
        function,
        {"amount": amount, left: codes[0], right: codes[1]},
        rng.choice([str(result), json.dumps({"result": result}), json.dumps({"amount": result, "currency": codes[1]})]),
        f"{amount} {codes[0]} is {result} {codes[1]}.",
        f"{amount} {codes[0]} in {codes[1]}",
        (f"money {amount} {codes}",),
    )


def tool_timer(rng: Random) -> Use:
    minutes, key = rng.randint(2, 120), rng.choice(["minutes", "duration"])
    function = described(
        rng,
        rng.choice(["set_timer", "start_timer", "timer"]),
        rng.choice(["Sets a timer.", "Start a timer."]),
        {key: ("integer", rng.choice(["Minutes", "How many minutes"]))},
    )
    template = rng.choice(
        [
            "Set a timer for {} minutes.",
            "Start a timer of {} minutes.",
            "Wake me in {} minutes.",
            "Timer: {} minutes",
            "Please set a timer for {} minutes",
        ]
    )
    return Use(
        template.format(minutes),
        function,
        {key: minutes},
        rng.choice(["ok", '{"status": "ok"}', "done"]),
        f"The timer is set for {minutes} minutes.",
        f"a timer of {minutes} minutes",
        (f"timer {minutes} {template}",),
    )


def tool_light(rng: Random) -> Use:
    room, state = (
        rng.choice("kitchen bathroom bedroom garage garden office cellar hall".split()),
        rng.choice(["on", "off"]),
    )
    where, what = rng.choice([("room", "state"), ("room", "mode"), ("location", "state")])
    function = described(
        rng,
        rng.choice(["set_light", "switch_light", "light"]),
        rng.choice(["Switches a light.", "Turns lights on or off."]),
        {where: ("string", "The room"), what: ("string", "on or off")},
        **{what: ["on", "off"]},
    )
    template = rng.choice(
        [
            "Turn {s} the light in the {r}.",
            "Switch {s} the {r} light.",
            "Turn the {r} light {s}.",
            "Light {s} in the {r}, please.",
        ]
    )
    return Use(
        template.format(s=state, r=room),
        function,
        {where: room, what: state},
        rng.choice(["ok", '{"status": "ok"}', "done"]),
        f"The light in the {room} is {state}.",
        f"the light in the {room}",
        (f"light {room} {state} {template}",),
    )


def tool_message(rng: Random) -> Use:
    name = rng.choice(facts.NAMES)
    text = rng.choice(
        [
            "see you on {d}",
            "dinner is at {n}",
            "I am late",
            "happy birthday",
            "call me on {d}",
            "I will come at {n}",
            "the {w} is here",
            "I like the {w}",
            "please buy a {w}",
        ]
    ).format(d=rng.choice(facts.DAYS), n=rng.randint(1, 12), w=rng.choice(facts.WORDS))
    to, body = rng.choice([("to", "text"), ("recipient", "message"), ("name", "content")])
    function = described(
        rng,
        rng.choice(["send_message", "send_text", "message"]),
        rng.choice(["Sends a message.", "Send a text message to someone."]),
        {to: ("string", "Who gets it"), body: ("string", "What it says")},
    )
    question = rng.choice(
        ["Send a message to {n}: {t}", "Tell {n}: {t}", "Write to {n}: {t}", "Message {n}: {t}"]
    ).format(n=name, t=text)
    return Use(
        question,
        function,
        {to: name, body: text},
        rng.choice(["ok", '{"status": "sent"}', "sent"]),
        f"The message to {name} is sent.",
        f"a message to {name}",
        (f"message {name} {text}",),
    )


def tool_search(rng: Random) -> Use:
    words = " ".join(rng.sample(facts.WORDS, rng.randint(1, 3)))
    found, key = " ".join(rng.sample(facts.WORDS, rng.randint(2, 4))), rng.choice(["query", "q", "text", "keywords"])
    function = described(
        rng,
        rng.choice(["search", "web_search", "find", "search_documents"]),
        rng.choice(["Searches the web.", "Search for documents."]),
        {key: ("string", rng.choice(["What to search", "The query"]))},
    )
    question = rng.choice(
        ["Search for {}.", "Search the web for {}", "Find something about {}.", "Look up {}."]
    ).format(words)
    result = rng.choice([found, json.dumps({"title": found}), json.dumps({"results": [found]})])
    return Use(question, function, {key: words}, result, f"I found: {found}", words, (f"search {words}",))


def tool_population(rng: Random) -> Use:
    country, millions = rng.choice(facts.countries()).name, rng.randint(1, 999)
    function = described(
        rng,
        rng.choice(["get_population", "population"]),
        rng.choice(["Gets the population of a country.", "Population in millions."]),
        {"country": ("string", "The country")},
    )
    template = rng.choice(
        [
            "What is the population of {}?",
            "How many people live in {}?",
            "population of {}",
            "How many inhabitants does {} have?",
        ]
    )
    return Use(
        template.format(country),
        function,
        {"country": country.removeprefix("the ")},
        rng.choice([f"{millions} million", json.dumps({"population": f"{millions} million"})]),
        f"The population of {country} is {millions} million.",
        f"the population of {country}",
        (f"population {template} {country}",),
    )


TOOLS = [
    tool_weather,
    tool_weather,
    tool_calculator,
    tool_calculator,
    tool_time,
    tool_money,
    tool_timer,
    tool_light,
    tool_message,
    tool_search,
    tool_population,
]


def call_analysis(use: Use, effort: str) -> str:
    name = use.function.name
    if effort == "low":
        return f"Use {name}."
    said = f"The user wants {use.about}. I call {name}."
    return said if effort == "medium" else f"{said} Its arguments are {', '.join(use.arguments)}. Then I can answer."


def result_analysis(use: Use, effort: str) -> str:
    if effort == "low":
        return f"{use.function.name} answered."
    said = f"{use.function.name} answered: {use.result}."
    return said if effort == "medium" else f"{said} The user wanted {use.about}. So I answer: {use.final}"


def offered(rng: Random, *needed: Function, without: Sequence[str] = ()) -> tuple[Function, ...]:
    """The needed functions among others, no two from the same generator's names."""
    functions, kinds = list(needed), {*without}
    for make in rng.sample(sorted({*TOOLS}, key=lambda f: f.__name__), rng.choice([0, 0, 1, 1, 2, 3])):
        function = make(rng).function
        if make.__name__ not in kinds and all(function.name != other.name for other in functions):
            functions.append(function)
            kinds.add(make.__name__)
    rng.shuffle(functions)
    return tuple(functions)


def tools(rng: Random, effort: str, date: datetime.date) -> Example:
    """A call, or the answer after one; now and then with an exchange before."""
    make = rng.choice(TOOLS)
    use = make(rng)
    functions = offered(rng, use.function, without=[make.__name__])
    turns = preface(rng)[0]
    draw, earlier = rng.random(), ()
    if draw < 0.15:  # an earlier use of the same function
        before = make(rng)
        if before.function.name == use.function.name and [*before.arguments] == [*use.arguments]:
            turns += used_turns(rng, before, effort) + [Turn("assistant", before.final)]
            earlier = before.keys
    elif draw < 0.25:
        first = rng.choice([countries, chat, dates])(rng)
        turns += [Turn("user", first.question), Turn("assistant", first.final)]
        earlier = first.keys
    arguments = json.dumps(use.arguments, ensure_ascii=False)
    if rng.random() < 0.5:
        turns.append(Turn("user", use.question))
        analysis = "" if rng.random() < 0.1 else call_analysis(use, effort)
        call = Call(use.function.name, arguments)
        return Example("tool calls", turns, effort, date, functions, analysis, call=call, keys=use.keys, before=earlier)
    turns += used_turns(rng, use, effort)
    analysis = result_analysis(use, effort)
    return Example("tool answers", turns, effort, date, functions, analysis, use.final, keys=use.keys, before=earlier)


def used_turns(rng: Random, use: Use, effort: str) -> list[Turn]:
    call = Call(use.function.name, json.dumps(use.arguments, ensure_ascii=False))
    reasoning = call_analysis(use, effort) if rng.random() < 0.5 else ""
    return [
        Turn("user", use.question),
        Turn("assistant", "", reasoning, (call,)),
        Turn("tool", use.result, name=use.function.name),
    ]


# --- plain text


def plain(rng: Random) -> Example:
    country = rng.choice(facts.countries())
    day, month = rng.randrange(7), rng.randrange(12)
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    word = rng.choice(facts.WORDS)
    name = country.name
    given, continued = rng.choice(
        [
            (f"The capital of {name} is", f" {country.capital}."),
            (f"The capital city of {name} is", f" {country.capital}."),
            (f"{country.capital} is the capital of", f" {name}."),
            (f"The currency of {name} is the", f" {country.currency}."),
            (f"{sentence(name)} is a country in", f" {country.continent}."),
            (f"The day after {facts.DAYS[day]} is", f" {facts.DAYS[(day + 1) % 7]}."),
            (f"The day before {facts.DAYS[day]} is", f" {facts.DAYS[(day - 1) % 7]}."),
            (f"The month after {facts.MONTHS[month]} is", f" {facts.MONTHS[(month + 1) % 12]}."),
            (f"{a} + {b} =", f" {a + b}"),
            (f"{a} plus {b} is", f" {a + b}."),
            (f"The first letter of {word} is", f" {word[0]}."),
        ]
    )
    # Days and months are too few to keep any apart.
    keys = (
        ()
        if "day " in given or "month" in given
        else (operand_key(a, "+", b),)
        if str(a) == given.split()[0]
        else (f"plain {given}",)
    )
    return Example("plain", text=(given, continued), keys=keys)


# --- conversations

INSTRUCTIONS = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Be helpful and polite.",
    "Answer the user's questions.",
    "You are an assistant in a demo.",
    "Be brief.",
    "Be concise.",
    "You are a helpful AI assistant.",
    "Always be polite.",
]
ONLY_ANSWER = [
    "Answer with the result only.",
    "Reply with the answer only.",
    "Give only the answer, no sentence.",
    "You answer with nothing but the result.",
    "Only output the answer.",
]


def preface(rng: Random, may_shorten: bool = False) -> tuple[list[Turn], bool]:
    """A developer's instructions or none, and whether they ask for the answer alone."""
    draw, role = rng.random(), rng.choice(["system", "developer"])
    if draw < 0.6:
        return [], False
    if draw < 0.8 or not may_shorten:
        return [Turn(role, rng.choice(INSTRUCTIONS))], False
    return [Turn(role, rng.choice(ONLY_ANSWER))], True


SINGLE: list[tuple[Callable[[Random], Task], float]] = [
    (arithmetic, 5),
    (countries, 4),
    (dates, 3),
    (units, 3),
    (letters, 4),
    (lists, 3),
    (chat, 1.5),
]
SKILLS = [
    "arithmetic",
    "countries",
    "dates",
    "units",
    "letters",
    "lists",
    "chat",
    "today",
    "refuse",
    "follow-up",
    "tool calls",
    "tool answers",
    "plain",
]
WEIGHTS = {
    **{make.__name__: weight for make, weight in SINGLE},
    "today": 0.5,
    "refuse": 1.5,
    "follow-up": 3.5,
    "tools": 5,
    "plain": 1.5,
}


def example(rng: Random, junk: Callable[[], str] | None = None, skill: str = "") -> Example:
    """One example, of any skill if none is named. `junk` makes words that the model need not know, to decline."""
    skill = skill or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    effort = rng.choice(EFFORTS)
    date = datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(4000))
    if skill == "plain":
        return plain(rng)
    if skill == "tools":
        return tools(rng, effort, date)
    turns, shorten = preface(rng, may_shorten=True)
    before: tuple[str, ...] = ()
    if junk and not turns and rng.random() < 0.05:
        turns = [Turn("system", f"{rng.choice(['You are', 'Be', 'Answer', 'Always'])} {junk()}.")]
    if skill == "follow-up":
        first, task = follow_up(rng)
        before = first.keys
        turns += [
            Turn("user", first.question),
            Turn("assistant", first.short if shorten and first.short else first.final),
        ]
    elif skill == "today":
        task = today(rng, date)
    elif skill == "refuse":
        task = refuse(rng, junk)
    else:
        task = globals()[skill](rng)
    if skill not in ("follow-up", "refuse") and rng.random() < 0.12:  # an exchange that does not matter
        first = rng.choices([make for make, _ in SINGLE], [weight for _, weight in SINGLE])[0](rng)
        turns += [
            Turn("user", first.question),
            Turn("assistant", first.short if shorten and first.short else first.final),
        ]
        before = first.keys
    functions: tuple[Function, ...] = ()
    if rng.random() < 0.12 and skill != "follow-up":  # tools that are no use here
        functions = offered(
            rng, without=["tool_calculator", "tool_money", "tool_population", "tool_search", task.needs]
        )
    turns.append(Turn("user", task.question))
    final = task.short if shorten and task.short else task.final
    return Example(
        task.skill, turns, effort, date, functions, task.analysis(effort, final), final, keys=task.keys, before=before
    )
