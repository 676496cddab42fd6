"""Examples to tokens: the server's own rendering, the split by hash, rows of packed documents, the vocabulary.

Of a conversation the model learns the assistant's next message with its analysis and control tokens.
"""

import hashlib
import multiprocessing
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from random import Random
from typing import NamedTuple

import numpy as np

from conf.limits import CALL, CHANNEL, END, ENDOFTEXT, FIRST_SPECIAL, MESSAGE, RETURN, START, VOCABULARY
from demo.training import facts
from demo.training.skills import Example, example, sentence
from engine.tokenizer import Tokenizer
from serve.harmony import any_call_header, call_header, render

ROW = 512  # tokens
STOPS = (RETURN, CALL, ENDOFTEXT)
HELD_OUT = 20  # one key in this many is kept from training
POOL = 512  # documents packed together

tokenizer = cache(Tokenizer)


class Document(NamedTuple):
    """Token ids: the prompt, and the completion to learn, with its stop token."""

    prompt: list[int]
    completion: list[int]


def held_out(keys: tuple[str, ...]) -> bool:
    """Whether an example rests on something that training never sees."""
    return any(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) % HELD_OUT == 0 for key in keys)


def document(e: Example) -> Document:
    """As the server would render it, on the example's date."""
    t = tokenizer()
    if e.text[0]:
        return Document(t.encode(e.text[0]), [*t.encode(e.text[1]), ENDOFTEXT])
    prompt = render(e.turns, e.effort, e.today, t, 10 * ROW, e.functions)
    assistant, completion = t.encode("assistant"), []
    if e.analysis:
        completion = [CHANNEL, *t.encode("analysis"), MESSAGE, *t.encode(e.analysis), END, START, *assistant]
    if not e.call:
        return Document(prompt, [*completion, CHANNEL, *t.encode("final"), MESSAGE, *t.encode(e.final), RETURN])
    header = call_header(t, e.call.name)
    if not e.analysis:  # tool_choice demands a call: its header is prefilled in the prompt
        prefilled = any_call_header(t)
        prompt, header = prompt + prefilled, header[len(prefilled) :]
    return Document(prompt, [*completion, *header, *t.encode(e.call.arguments), CALL])


def junk(rng: Random) -> str:
    """A few random tokens as text, of any language."""
    t = tokenizer()
    tokens = [rng.randrange(FIRST_SPECIAL) for _ in range(rng.randint(1, 4))]
    return b"".join(map(t.token_bytes, tokens)).decode("utf-8", "ignore").strip() or "?"


def training(seed: int, with_junk: bool = True) -> Iterator[Document]:
    """Endless documents, the same for the same seed."""
    rng = Random(seed)
    while True:
        e = example(rng, partial(junk, rng) if with_junk else None)
        if not held_out(e.keys + e.before):
            d = document(e)
            if len(d.prompt) + len(d.completion) <= ROW:
                yield d


def evaluation(skill: str, count: int, seed: int = 0) -> list[Example]:
    """Examples of one of SKILLS that each ask for something held out, all different; fewer than `count` if rare."""
    rng, seen = Random(f"{skill} {seed}"), set[str]()
    examples: list[Example] = []
    for _ in range(2000 * count):
        e = example(rng, None, "tools" if skill.startswith("tool") else skill)
        if e.skill == skill and held_out(e.keys) and str(e) not in seen:
            d = document(e)
            if len(d.prompt) + len(d.completion) <= ROW:
                seen.add(str(e))
                examples.append(e)
        if len(examples) == count:
            break
    return examples


def rows(documents: Iterator[Document], index: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Endless packed rows: compact tokens, document numbers, and whether a token is learned; [ROW] each.

    `index`: compact token by token. A pool of documents is packed first-fit, the longest first.
    """
    while True:
        pool = sorted((next(documents) for _ in range(POOL)), key=lambda d: -len(d.prompt) - len(d.completion))
        bins: list[list[Document]] = []
        room: list[int] = []
        for d in pool:
            size = len(d.prompt) + len(d.completion)
            place = next((n for n, free in enumerate(room) if free >= size), len(bins))
            if place == len(bins):
                bins.append([])
                room.append(ROW)
            bins[place].append(d)
            room[place] -= size
        for held in bins:
            tokens, numbers, learned = np.zeros(ROW, np.int16), np.full(ROW, -1, np.int16), np.zeros(ROW, bool)
            at = 0
            for number, (prompt, completion) in enumerate(held):
                middle, end = at + len(prompt), at + len(prompt) + len(completion)
                tokens[at:end] = index[prompt + completion]
                numbers[at:end], learned[middle:end] = number, True
                at = end
            yield tokens, numbers, learned


def _tokens_of(seed: int, count: int) -> set[int]:
    return {token for made in islice(training(seed, with_junk=False), count) for field in made for token in field}


def vocabulary(count: int = 60000) -> list[int]:
    """The tokens that have rows of their own, in order: those of all closed lists and of `count` conversations."""
    t = tokenizer()
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    texts = [f"{n:0{digits}}" for digits in (1, 2, 3) for n in range(10**digits)]
    texts += [form.format(c) for c in letters for form in ("{}", " {}", "-{}", "{}'s", '"{}')]
    texts += [*" .,:;?!'\"()-+*/=<>°%$#&\n×÷−", "\n\n", *(f" {sign}" for sign in "→×÷-+*/=−")]
    texts += [form.format(w) for w in facts.WORDS for form in ("{}", " {}", '"{}"', "-{}", "{}s", " {}s")]
    names = [name for c in facts.countries() for name in (*c, c.name.removeprefix("the "))]
    for name in [*names, *facts.CITIES, *facts.NAMES, *facts.COLORS, *facts.ANIMALS, *facts.DAYS, *facts.MONTHS]:
        texts += [name, f" {name}", f'"{name}"', f"{name}'s", name.lower(), f" {name.lower()}", sentence(name)]
    tokens = {START, END, MESSAGE, CHANNEL, RETURN, CALL, ENDOFTEXT}
    for text in texts:
        tokens.update(t.encode(text))
    with multiprocessing.get_context("spawn").Pool() as pool:
        sets = pool.starmap(_tokens_of, [(1000 + n, count // 32) for n in range(32)])
    tokens.update(*sets)
    spare = iter(sorted({*range(VOCABULARY)} - tokens))
    while (len(tokens) + 1) % 64:  # with the row for all others a size that matrix products like
        tokens.add(next(spare))
    return sorted(tokens)


def index_of(tokens: list[int]) -> np.ndarray:
    """Compact token by token; the last one for all that have no row."""
    index = np.full(VOCABULARY, len(tokens), np.int32)
    index[tokens] = np.arange(len(tokens))
    return index
