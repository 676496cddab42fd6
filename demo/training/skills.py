"""What the demo model can do: a generator of questions and worked answers for each skill, and conversations of them.

Every answer is a function of its question, so that exact match is a fair measure. Knows no tokens. Keys name the facts,
operands or phrasings that an example rests on: `demo.training.data` keeps some of them from training.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from demo.training import facts, phrases, tools
from demo.training.sums import count_steps, divide_steps, number, operand_key, operands, spaced, times_digit_steps, work
from serve.harmony import Call, Function, Turn

EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Task:
    """A question with its answer, before it becomes part of a conversation."""

    question: str
    intent: str  # the first sentence of a longer analysis
    steps: str  # the work, the whole of a short analysis
    final: str
    key: str
    short: str = ""  # the answer alone, where a developer asks for that; empty: the same
    value: Any = None  # what a later turn may refer to
    needs: str = ""  # the generator of the tool that would help

    def analysis(self, effort: str, final: str) -> str:
        if effort == "low":
            return self.steps
        if effort == "medium":
            return f"{self.intent} {self.steps}"
        return f"{self.intent} Let me work it out. {self.steps} So I answer: {final}"

    def answer(self, shorten: bool) -> str:
        return self.short if shorten and self.short else self.final


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
    keys: tuple[str, ...] = ()  # of the question
    before: tuple[str, ...] = ()  # keys of earlier turns


def sentence(text: str) -> str:
    """Begun with a capital letter, the rest as it is."""
    return text[0].upper() + text[1:]


def counted(count: int, unit: str) -> str:
    """`unit` in the plural."""
    return f"{count} {facts.SINGULAR.get(unit, unit.removesuffix('s')) if count == 1 else unit}"


# --- arithmetic


def arithmetic(rng: Random) -> Task:
    op = rng.choice("++--**/")
    a, b = operands(rng, op)
    if op in phrases.STORIES and rng.random() < 0.2:
        return story(rng, op)
    phrase = rng.choice(phrases.SAID[op] if rng.random() < 0.5 else phrases.SAID[op][:2]).format(a=a, b=b)
    steps, result = work(a, op, b)
    value = int(result) if result.lstrip("-").isdigit() else None
    return Task(
        rng.choice(phrases.ASK).format(phrase),
        f"The user asks for {a} {op} {b}.",
        steps,
        f"{a} {op} {b} = {result}",
        operand_key(a, op, b),
        result,
        value,
    )


def story(rng: Random, op: str) -> Task:
    a, b = rng.randint(2, 99), rng.randint(2, 9 if op == "*" else 99)
    a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
    story, ending = rng.choice(phrases.STORIES[op])
    steps, result = work(a, op, b)
    slots = {"a": a, "b": b, "w": rng.choice(phrases.THINGS), "n": rng.choice(facts.NAMES), "r": result}
    return Task(
        story.format(**slots),
        f"This is {a} {op} {b}.",
        steps,
        ending.format(**slots),
        operand_key(a, op, b),
        result,
        int(result),
    )


# --- countries


def country_fact(kind: str, country: facts.Country, question: str, key: str) -> Task:
    name, title = country.name, sentence(country.name)
    if kind == "capital":
        answer, short = f"The capital of {name} is {country.capital}.", country.capital
    elif kind == "continent":
        answer, short = f"{title} is in {country.continent}.", country.continent
    else:
        answer, short = f"The currency of {name} is the {country.currency}.", country.currency
    return Task(
        question,
        f"The user asks for the {kind} of {name}.",
        f"{title}: {short}.",
        answer,
        f"{kind} {name} {key}",
        short,
        country,
    )


def named(rng: Random, template: str, name: str) -> str:
    """Now and then without the article, or all in small letters."""
    if name.startswith("the ") and rng.random() < 0.3:
        name = name[4:]
    text = sentence(template.format(name))
    return text.lower() if rng.random() < 0.15 else text


def countries(rng: Random) -> Task:
    country = rng.choice(facts.countries())
    draw = rng.random()
    if draw < 0.7:
        kind, templates = rng.choice(
            [("capital", phrases.CAPITAL), ("continent", phrases.CONTINENT), ("currency", phrases.CURRENCY)]
        )
        template = rng.choice(templates)
        return country_fact(kind, country, named(rng, template, country.name), template)
    name, capital = country.name, country.capital
    if draw < 0.85:
        template = rng.choice(phrases.CAPITAL_OF)
        return Task(
            template.format(capital),
            f"The user asks which country has the capital {capital}.",
            f"{capital}: {name}.",
            f"{capital} is the capital of {name}.",
            f"capital of {capital} {template}",
            sentence(name),
            country,
        )
    template = rng.choice(phrases.CHECK)
    claimed = capital if rng.random() < 0.5 else rng.choice(facts.countries()).capital
    short, final = "Yes", f"Yes, {capital} is the capital of {name}."
    if claimed != capital:
        short, final = "No", f"No, the capital of {name} is {capital}."
    return Task(
        template.format(claimed, name),
        f"The user asks whether {claimed} is the capital of {name}.",
        f"{sentence(name)}: {capital}. {short}.",
        final,
        f"check {name} {claimed} {template}",
        short,
        country,
    )


# --- dates


def dates(rng: Random) -> Task:
    return rng.choice(
        [weekday_shift, weekday_shift, weekday_next, month_length, month_shift, date_shift, date_shift, date_between]
    )(rng)


def weekday_shift(rng: Random) -> Task:
    start, count, later = rng.randrange(7), rng.randint(1, 99), rng.random() < 0.7
    shift, (step, rest) = counted(count, "days"), (1 if later else -1, count % 7)
    path = [facts.DAYS[(start + step * n) % 7] for n in range(rest + 1)]
    day, end = path[0], path[-1]
    question = (
        rng.choice(phrases.WEEKDAY_SHIFT)
        .format(
            d=day,
            n=count,
            p="day" if count == 1 else "days",
            after="after" if later else "before",
            will="will" if later else "was",
            in_=f"in {shift}" if later else f"{shift} ago",
        )
        .replace("was it be", "was it")
    )
    return Task(
        question,
        f"The user starts at {day} and goes {shift} {'on' if later else 'back'}.",
        f"{count} = {count - rest} + {rest}. {', '.join(path)}.",
        f"It {'is' if later else 'was'} {end}.",
        f"weekday {day} {count} {later}",
        end,
    )


def weekday_next(rng: Random) -> Task:
    start, after = rng.randrange(7), rng.random() < 0.5
    day, end = facts.DAYS[start], facts.DAYS[(start + (1 if after else -1)) % 7]
    word = "after" if after else "before"
    template = rng.choice(phrases.WEEKDAY_NEXT)
    return Task(
        template.format(w=word, d=day),
        f"The user asks for the day {word} {day}.",
        f"{word} {day}: {end}.",
        f"The day {word} {day} is {end}.",
        f"next {template} {day} {after}",
        end,
    )


def month_length(rng: Random) -> Task:
    month, year = rng.randrange(12), rng.randint(1990, 2040)
    with_year = month == 1 or rng.random() < 0.3
    name = facts.MONTHS[month] + (f" {year}" if with_year else "")
    count = facts.MONTH_DAYS[month]
    steps = f"{facts.MONTHS[month]} has {count} days."
    if month == 1:
        leap = year % 4 == 0  # in all years that are drawn
        count += leap
        steps = f"{year}/4 leaves {year % 4}: {'a leap year' if leap else 'no leap year'}."
    template = rng.choice(phrases.MONTH_LENGTH)
    return Task(
        template.format(name),
        f"The user asks for the length of {name}.",
        steps,
        f"{name} has {count} days.",
        f"length {name} {template if not with_year else ''}",
        str(count),
    )


def month_shift(rng: Random) -> Task:
    start, count, later = rng.randrange(12), rng.randint(1, 11), rng.random() < 0.7
    path = [facts.MONTHS[(start + (n if later else -n)) % 12] for n in range(count + 1)]
    word = "after" if later else "before"
    question = rng.choice(phrases.MONTH_SHIFT).format(n=count, p="month" if count == 1 else "months", w=word, m=path[0])
    return Task(
        question,
        f"The user asks for the month {counted(count, 'months')} {word} {path[0]}.",
        f"{', '.join(path)}.",
        f"It is {path[-1]}.",
        f"month {path[0]} {count} {later}",
        path[-1],
    )


def date_shift(rng: Random) -> Task:
    """In a year that is no leap year."""
    month, count, later = rng.randrange(12), rng.randint(1, 40), rng.random() < 0.6
    day = rng.randint(1, facts.MONTH_DAYS[month])
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
    answer, word = f"{facts.MONTHS[end_month]} {end}", "after" if later else "before"
    written = start if rng.random() < 0.7 else f"{day} {facts.MONTHS[month]}"
    question = rng.choice(phrases.DATE_SHIFT).format(n=count, p="day" if count == 1 else "days", w=word, d=written)
    return Task(
        question,
        f"The user asks for the date {counted(count, 'days')} {word} {start}.",
        steps,
        f"It is {answer}.",
        f"date {start} {count} {later}",
        answer,
    )


def date_between(rng: Random) -> Task:
    month = rng.randrange(12)
    first, last = sorted(rng.sample(range(1, 29), 2))
    name, count = facts.MONTHS[month], last - first
    question = rng.choice(phrases.DATE_BETWEEN).format(m=name, a=first, b=last)
    return Task(
        question,
        f"The user counts the days from {name} {first} to {name} {last}.",
        f"{last}-{first}={count}.",
        f"{counted(count, 'days')}.",
        f"between {month} {first} {last}",
        str(count),
    )


def today(rng: Random, date: datetime.date) -> Task:
    """`date` is what the system message says."""

    def spoken(day: datetime.date) -> str:
        return f"{facts.MONTHS[day.month - 1]} {day.day}, {day.year}"

    kind = rng.choice([phrases.TODAY, phrases.TODAY, phrases.TOMORROW, phrases.YEAR, phrases.MONTH])
    question, steps = rng.choice(kind), f"Current date: {date.isoformat()}."
    if kind is phrases.TODAY:
        final, short = f"Today is {spoken(date)}.", spoken(date)
    elif kind is phrases.TOMORROW:
        tomorrow = date + datetime.timedelta(days=1)
        steps += f" The next day: {tomorrow.isoformat()}."
        final, short = f"Tomorrow is {spoken(tomorrow)}.", spoken(tomorrow)
    elif kind is phrases.YEAR:
        final, short = f"It is {date.year}.", str(date.year)
    else:
        final, short = f"It is {facts.MONTHS[date.month - 1]}.", facts.MONTHS[date.month - 1]
    return Task(
        question,
        "The user asks for the date. It is in the system message.",
        steps,
        final,
        f"today {question} {date}",
        short,
    )


# --- units


def units(rng: Random) -> Task:
    if rng.random() < 0.12:
        return temperature(rng)
    big, small, factor = rng.choice(facts.UNITS)
    back = rng.random() < 0.4  # to the larger unit
    count = number(rng, 1, digits=2 if back or factor in (24, 12, 16) else 3)
    if rng.random() < 0.08:
        count = 1
    zeros = {10: "0", 100: "0 0", 1000: "0 0 0"}.get(factor)
    if back:
        amount, source, target, result = count * factor, small, big, count
        if zeros:
            steps = f"{spaced(amount)} without {zeros}: {spaced(count)} = {count}."
        elif factor < 10:
            steps = f"{divide_steps(amount, factor)} = {count}."
        else:
            steps = f"{count_steps(amount, factor)}."
    else:
        amount, source, target, result = count, big, small, count * factor
        if zeros:
            steps = f"{spaced(count)} {zeros} = {result}."
        elif factor == 60:
            steps = f"times 6: {times_digit_steps(count, 6)} 0 = {result}."
        else:
            steps = work(count, "*", factor)[0]
    names = counted(amount, source).partition(" ")[2], target
    if source in facts.SYMBOLS and target in facts.SYMBOLS and rng.random() < 0.3:
        names = facts.SYMBOLS[source], facts.SYMBOLS[target]
    question = rng.choice(phrases.CONVERT).format(a=amount, u=names[0], v=names[1])
    short = counted(result, target)
    quantity = counted(amount, source)
    key = question if amount == 1 else str(amount)  # one of a unit is a word of its own: never kept apart altogether
    return Task(
        question,
        f"The user wants {quantity} in {target}.",
        f"{counted(1, big)} = {factor} {small}. {steps}",
        f"{quantity} = {short}",
        f"units {source} {target} {key}",
        short,
    )


def temperature(rng: Random) -> Task:
    """Of whole degrees on both scales."""
    celsius = 5 * rng.randint(0, 40)
    fifth, ninths, fahrenheit = celsius // 5, celsius // 5 * 9, celsius // 5 * 9 + 32
    if rng.random() < 0.5:
        question = rng.choice(phrases.TO_FAHRENHEIT).format(a=celsius)
        return Task(
            question,
            f"The user wants {celsius} Celsius in Fahrenheit.",
            f"{celsius}/5={fifth}, {fifth}*9={ninths}, {ninths}+32={fahrenheit}.",
            f"{celsius} °C = {fahrenheit} °F",
            f"celsius {question}",
            f"{fahrenheit} °F",
        )
    question = rng.choice(phrases.TO_CELSIUS).format(a=fahrenheit)
    return Task(
        question,
        f"The user wants {fahrenheit} Fahrenheit in Celsius.",
        f"{fahrenheit}-32={ninths}, {ninths}/9={fifth}, {fifth}*5={celsius}.",
        f"{fahrenheit} °F = {celsius} °C",
        f"fahrenheit {question}",
        f"{celsius} °C",
    )


# --- letters


def letters_of(kind: str, word: str, question: str, letter: str = "") -> Task:
    if kind == "spell":
        short, steps = "-".join(word), f"{spaced(word)}."
        final = f"{word} is spelled {short}."
    elif kind == "reverse":
        short, steps = "-".join(reversed(word)), f"{spaced(word)}. Backwards: {spaced(word[::-1])}."
        final = f"{word} backwards is {short}."
    elif kind == "count":
        short, steps = str(len(word)), f"{' '.join(f'{c}{n}' for n, c in enumerate(word, 1))}."
        final = f"{word} has {short} letters."
    elif kind == "count one":
        seen, marks = 0, []
        for c in word:
            seen += c == letter
            marks.append(f"{c}{seen}" if c == letter else c)
        short, steps = str(seen), f"{' '.join(marks)}. {letter}: {seen}."
        final = f"The letter {letter} appears {counted(seen, 'times')} in {word}."
    else:
        short = word[0] if kind == "first" else word[-1]
        steps, final = f"{spaced(word)}. {kind}: {short}.", f"The {kind} letter of {word} is {short}."
    return Task(
        question,
        f"The user asks about the letters of {word}.",
        f"{word}: {steps}",
        final,
        f"letters {kind} {letter} {word}",
        short,
        word,
    )


def letters(rng: Random) -> Task:
    word = rng.choice(facts.WORDS)
    quoted = f'"{word}"' if rng.random() < 0.4 else word
    kind = rng.choice(["spell", "reverse", "reverse", "count", "count one", "count one", rng.choice(["first", "last"])])
    letter = ""
    if kind == "count one":
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        question = rng.choice(phrases.COUNT_ONE).format(c=letter, w=quoted)
    elif kind in ("first", "last"):
        question = rng.choice(phrases.ENDS).format(p=kind, w=quoted, v="begin" if kind == "first" else "end")
    else:
        templates = {"spell": phrases.SPELL, "reverse": phrases.REVERSE, "count": phrases.COUNT}[kind]
        question = rng.choice(templates).format(quoted)
    return letters_of(kind, word, question, letter)


# --- lists


def lists(rng: Random) -> Task:
    draw = rng.random()
    return comparison(rng) if draw < 0.3 else list_of_numbers(rng) if draw < 0.8 else list_of_words(rng)


def comparison(rng: Random) -> Task:
    a, b = number(rng), number(rng)
    b += a == b
    larger = rng.random() < 0.6
    word, best = ("larger", max(a, b)) if larger else ("smaller", min(a, b))
    question = rng.choice(phrases.COMPARE).format(w=word, a=a, b=b)
    return Task(
        question,
        f"The user compares {a} and {b}.",
        f"{a} {'>' if a > b else '<'} {b}.",
        f"{best} is {word} than {a + b - best}.",
        f"compare {a} {b} {larger}",
        str(best),
    )


def list_of_numbers(rng: Random) -> Task:
    digits = rng.randint(1, 3)
    values = rng.sample(range(10**digits), rng.randint(3, 5))
    listed, ordered = ", ".join(map(str, values)), sorted(values)
    steps, key = f"In order: {', '.join(map(str, ordered))}.", f"sort {ordered}"
    kind = rng.random()
    if kind < 0.4:
        most = rng.random() < 0.5
        best, name = ordered[-1 if most else 0], rng.choice(phrases.LARGEST if most else phrases.SMALLEST)
        question = rng.choice(phrases.EXTREME).format(n=name, l=listed)
        return Task(
            question, f"The user asks for the {name} number.", steps, f"The {name} number is {best}.", key, str(best)
        )
    down = kind > 0.75
    answer = ", ".join(map(str, reversed(ordered) if down else ordered))
    question = rng.choice(phrases.SORT).format(l=listed, d=rng.choice(phrases.DOWN if down else phrases.UP))
    steps += f" Turned: {answer}." if down else ""
    return Task(question, "The user wants numbers in order.", steps, answer, key)


def list_of_words(rng: Random) -> Task:
    """No two with the same first letter."""
    words: dict[str, str] = {}
    for word in rng.sample(facts.WORDS, 12):
        words.setdefault(word[0], word)
    chosen = list(words.values())[: rng.randint(3, 4)]
    rng.shuffle(chosen)
    question = rng.choice(phrases.SORT_WORDS).format(", ".join(chosen))
    initials = [word[0] for word in chosen]
    steps = f"First letters: {' '.join(initials)}. In order: {' '.join(sorted(initials))}."
    return Task(question, "The user wants words in order.", steps, ", ".join(sorted(chosen)), f"words {sorted(chosen)}")


# --- chat and refusals


def chat(rng: Random) -> Task:
    if rng.random() < 0.1:
        name, template = rng.choice(facts.NAMES), rng.choice(phrases.I_AM)
        return Task(
            template.format(name),
            f"The user is {name}.",
            f"Greet {name}.",
            f"Hello {name}! How can I help you?",
            f"name {name} {template}",
        )
    about = rng.choice([*phrases.CHAT, "who I am"])
    final, questions = phrases.CHAT[about]
    opening = "" if about == "a greeting" else rng.choice(phrases.OPENINGS)
    question = f"{opening}{rng.choice(questions)}{rng.choice(phrases.CLOSINGS)}"
    intent = f"This is about {about}." if about.startswith(("who", "what", "how")) else f"This is {about}."
    return Task(question, intent, f"{sentence(about)}.", final, f"chat {question.lower()}")


def refuse(rng: Random, junk: Callable[[], str] | None = None) -> Task:
    """A question to decline; with `junk`, also about words that the model need not know."""
    intent, needs = "This is outside of what I can do.", ""
    if rng.random() < 0.2:
        make = rng.choice(
            [tools.weather, tools.time, tools.timer, tools.light, tools.message, tools.search, tools.population]
        )
        question, intent, needs = make(rng).question, "No tool for this is there.", make.__name__
    else:
        slots = (rng.choice(facts.WORDS), rng.randint(1900, 2030), rng.choice(facts.countries()).name)
        unknown = False
        if junk is not None and rng.random() < 0.4:
            unknown, slots = True, (junk(), *slots[1:])

        def drawn(templates: list[str]) -> str:
            return rng.choice([template for template in templates if "{0}" in template or not unknown]).format(*slots)

        if unknown and rng.random() < 0.6:
            blank = [
                *phrases.BLANK,
                *phrases.BLANK,
                *phrases.CAPITAL,
                *phrases.CURRENCY,
                *phrases.SPELL,
                *phrases.REVERSE,
            ]
            question = rng.choice(blank).format(slots[0])
        elif rng.random() < 0.5:
            task = drawn(phrases.TASKS)
            question = sentence(rng.choice(phrases.DO_TASK).format(task))
        else:
            fact = drawn(phrases.FACTS)
            question = sentence(rng.choice(phrases.TELL_FACT).format(fact))
    return Task(question, intent, "I can't do that.", phrases.REFUSAL, f"refuse {question.lower()}", needs=needs)


# --- second turns


def follow_up(rng: Random) -> tuple[Task, Task]:
    """An exchange, and a question that only makes sense after it."""
    return rng.choice([then_sum, then_sum, then_country, then_country, then_letters, then_memory])(rng)


def then_sum(rng: Random) -> tuple[Task, Task]:
    first = arithmetic(rng)
    while first.value is None or not 0 <= first.value <= 999:
        first = arithmetic(rng)
    value, kind = first.value, rng.choice("++-*d")
    other = {"*": rng.randint(2, 9), "d": 2}.get(kind) or number(rng, 1)
    question, op = rng.choice(phrases.THEN[kind]).format(other), "*" if kind == "d" else kind
    steps, result = work(value, op, other)
    return first, Task(
        question,
        f"The result was {value}. Now {value} {op} {other}.",
        f"{value} {op} {other}: {steps}",
        f"{value} {op} {other} = {result}",
        operand_key(value, op, other),
        result,
    )


def then_country(rng: Random) -> tuple[Task, Task]:
    first = countries(rng)
    while first.final.startswith(("Yes", "No")):
        first = countries(rng)
    kinds = ("capital", "continent", "currency")
    kind = next((kind for kind in kinds if first.key.startswith(f"{kind} {first.value.name}")), "")
    if kind and rng.random() < 0.5:
        other, template = rng.choice(facts.countries()), rng.choice(phrases.AND_COUNTRY)
        return first, country_fact(kind, other, template.format(other.name), f"{template} {first.value.name}")
    kind, question = rng.choice(phrases.AND_FACT)
    return first, country_fact(kind, first.value, question, f"{question} {first.question}")


def then_letters(rng: Random) -> tuple[Task, Task]:
    word = rng.choice(facts.WORDS)
    spell, count = rng.choice(phrases.SPELL).format(word), rng.choice(phrases.COUNT).format(word)
    first = letters_of(*rng.choice([("spell", word, spell), ("count", word, count)]))
    kind, question = rng.choice(phrases.AND_LETTERS)
    return first, letters_of(kind, word, question)


def then_memory(rng: Random) -> tuple[Task, Task]:
    what = rng.choice(["name", "favorite color", "favorite animal", "favorite number"])
    thing = rng.choice(
        {
            "name": facts.NAMES,
            "favorite color": facts.COLORS,
            "favorite animal": facts.ANIMALS,
            "favorite number": [str(n) for n in range(1, 1000)],
        }[what]
    )
    tell, ask = rng.choice(phrases.REMEMBER), rng.choice(phrases.RECALL)
    answer, steps = f"I see: your {what} is {thing}.", f"{sentence(what)}: {thing}."
    if what == "name":
        answer = f"Hello {thing}! How can I help you?"
    return (
        Task(tell.format(what, thing), "The user tells me something.", steps, answer, f"tell {what} {thing} {tell}"),
        Task(
            ask.format(what),
            f"The user told me the {what}.",
            steps,
            f"Your {what} is {thing}.",
            f"ask {what} {thing} {ask}",
            thing,
        ),
    )


# --- conversations

ALONE = {make.__name__: make for make in (arithmetic, countries, dates, units, letters, lists, chat)}
WEIGHTS = {
    "arithmetic": 5,
    "countries": 4,
    "dates": 3,
    "units": 3,
    "letters": 4,
    "lists": 3,
    "chat": 1.5,
    "today": 0.5,
    "refuse": 1.5,
    "follow-up": 3.5,
    "tools": 5,
    "plain": 1.5,
}
SKILLS = [*ALONE, "today", "refuse", "follow-up", "tool calls", "tool answers", "plain"]  # as they are evaluated
NO_HELP = ("calculator", "money", "population", "search")  # tools that might help where none is to be used


def example(rng: Random, junk: Callable[[], str] | None = None, skill: str = "") -> Example:
    """One example, of any of WEIGHTS if none is named. `junk` makes words that the model need not know, to decline."""
    skill = skill or rng.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
    effort = rng.choice(EFFORTS)
    date = datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(4000))
    if skill == "plain":
        return plain(rng)
    if skill == "tools":
        return tool_use(rng, effort, date)
    turns, shorten = preface(rng, may_shorten=True)
    if junk and not turns and rng.random() < 0.05:
        turns = [Turn("system", f"{rng.choice(['You are', 'Be', 'Answer', 'Always'])} {junk()}.")]
    first: Task | None = None
    if skill == "follow-up":
        first, task = follow_up(rng)
    elif skill == "today":
        task = today(rng, date)
    elif skill == "refuse":
        task = refuse(rng, junk)
    else:
        task = ALONE[skill](rng)
    if skill not in ("follow-up", "refuse") and rng.random() < 0.12:  # an exchange that does not matter
        first = rng.choices([*ALONE.values()], [WEIGHTS[name] for name in ALONE])[0](rng)
    if first:
        turns += [Turn("user", first.question), Turn("assistant", first.answer(shorten))]
    functions: tuple[Function, ...] = ()
    if rng.random() < 0.12 and skill != "follow-up":  # tools that are no use here
        functions = tools.offered(rng, without=[*NO_HELP, task.needs])
    turns.append(Turn("user", task.question))
    final = task.answer(shorten)
    return Example(
        skill,
        turns,
        effort,
        date,
        functions,
        task.analysis(effort, final),
        final,
        keys=(task.key,),
        before=(first.key,) if first else (),
    )


def preface(rng: Random, may_shorten: bool = False) -> tuple[list[Turn], bool]:
    """A developer's instructions or none, and whether they ask for the answer alone."""
    draw, role = rng.random(), rng.choice(["system", "developer"])
    if draw < 0.6:
        return [], False
    if draw < 0.8 or not may_shorten:
        return [Turn(role, rng.choice(phrases.INSTRUCTIONS))], False
    return [Turn(role, rng.choice(phrases.ONLY_ANSWER))], True


def tool_use(rng: Random, effort: str, date: datetime.date) -> Example:
    """A call, or the answer after one; now and then with an exchange before."""
    make = rng.choice(tools.USES)
    use = make(rng)
    functions = tools.offered(rng, use.function, without=[make.__name__])
    turns, _ = preface(rng)
    draw = rng.random()
    earlier: tuple[str, ...] = ()
    if draw < 0.15:
        before = make(rng)
        if before.function.name == use.function.name and [*before.arguments] == [*use.arguments]:
            turns += [*used_turns(rng, before, effort), Turn("assistant", before.final)]
            earlier = (before.key,)
    elif draw < 0.25:
        first = rng.choice([countries, chat, dates])(rng)
        turns += [Turn("user", first.question), Turn("assistant", first.final)]
        earlier = (first.key,)
    if rng.random() < 0.5:
        turns.append(Turn("user", use.question))
        analysis = "" if rng.random() < 0.1 else use.call_analysis(effort)
        call = Call(use.function.name, use.arguments_json)
        return Example(
            "tool calls", turns, effort, date, functions, analysis, call=call, keys=(use.key,), before=earlier
        )
    turns += used_turns(rng, use, effort)
    return Example(
        "tool answers",
        turns,
        effort,
        date,
        functions,
        use.result_analysis(effort),
        use.final,
        keys=(use.key,),
        before=earlier,
    )


def used_turns(rng: Random, use: tools.Use, effort: str) -> list[Turn]:
    reasoning = use.call_analysis(effort) if rng.random() < 0.5 else ""
    return [
        Turn("user", use.question),
        Turn("assistant", "", reasoning, (Call(use.function.name, use.arguments_json),)),
        Turn("tool", use.result, name=use.function.name),
    ]


def plain(rng: Random) -> Example:
    country = rng.choice(facts.countries())
    day, month = rng.randrange(7), rng.randrange(12)
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    word = rng.choice(facts.WORDS)
    name, days, months = country.name, facts.DAYS, facts.MONTHS
    texts = [
        (f"The capital of {name} is", f" {country.capital}."),
        (f"The capital city of {name} is", f" {country.capital}."),
        (f"{country.capital} is the capital of", f" {name}."),
        (f"The currency of {name} is the", f" {country.currency}."),
        (f"{sentence(name)} is a country in", f" {country.continent}."),
        (f"The day after {days[day]} is", f" {days[(day + 1) % 7]}."),
        (f"The day before {days[day]} is", f" {days[(day - 1) % 7]}."),
        (f"The month after {months[month]} is", f" {months[(month + 1) % 12]}."),
        (f"{a} + {b} =", f" {a + b}"),
        (f"{a} plus {b} is", f" {a + b}."),
        (f"The first letter of {word} is", f" {word[0]}."),
    ]
    given, continued = rng.choice(texts)
    keys: tuple[str, ...] = (f"plain {given}",)
    if given.startswith(f"{a} "):
        keys = (operand_key(a, "+", b),)
    elif "day " in given or "month" in given:  # too few to keep some from training
        keys = ()
    return Example("plain", text=(given, continued), keys=keys)
