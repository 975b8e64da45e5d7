"""Calibration texts with continuations that repeat specifics of the context.

Ordinary prose hardly rewards recall: its next words can mostly be guessed. Here the continuation
restates, or asks for, facts that only the context gives, in other words than the context's: about
people and things, items of a list, values in code, amounts and their sum.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from awareness_vllm.anchors.facts import (
    CITY,
    CODE,
    COLOURS,
    DATE,
    FILLER,
    JOB,
    MONTHS,
    THINGS,
    Line,
    distinct_people,
    fill_templates,
    sentences,
)
from awareness_vllm.anchors.words import FIT

PEOPLE_QUESTIONS = """
Q: Where is {name} at home? A: {city}|Q: Who is {name}? A: {a_job} from {city}
Q: Which number belongs to {name}? A: {code}|Q: What does {name} do? A: {name} is {a_job}.
Home of {name}: {city}|Occupation of {name}: {job}|Number of {name}: {code}
{name} ({job}), {city}, {code}|The number of {name} was {code}.|{name} comes from {city}.
Q: Who has the number {code}? A: {name}|Q: Who is the {job}? A: {name}
"""
THING_SENTENCES = """
{who} owns a {colour} {thing}.|{who} keeps a {colour} {thing} in the cellar.
{who} sold a {colour} {thing} for {price} dollars.|The {colour} {thing} belongs to {who}.
The {thing} of {who} is {colour} and cost {price} dollars.
"""
THING_QUESTIONS = """
Q: Which colour has the {thing} of {name}? A: {colour}|Owner of the {thing}: {name}
Q: What does {name} have? A: a {colour} {thing}|Whose is the {colour} {thing}? It is {name}'s.
"""
LIST_SENTENCES = """
What to pack: {items}.|On the table lay {items}.|The shop sells {items}.
The order, in turn: {items}.
"""
LIST_QUESTIONS = """
Once more, the same things: {items}.|The first was the {first}, the last the {last}.
After the {one} came the {two}.|In all {count} things: {items}.
"""
NAMES = (
    "timeout", "retries", "width", "height", "port", "depth", "limit", "offset", "batch_size",
    "margin", "workers", "seed", "threshold", "cache_size", "max_lines", "interval",
)  # fmt: skip


def recall_texts(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs of a context and a continuation that repeats its specifics."""
    return [_pair(random.Random(f"recall {seed} {i}"), i) for i in range(count)]


def _pair(rng: random.Random, number: int) -> tuple[str, str]:
    """Every other pair is about people; the other kinds take turns between them."""
    kinds: tuple[Callable[[random.Random], tuple[str, str]], ...] = (things, items, settings, sums)
    return people(rng) if number % 2 == 0 else kinds[number // 2 % len(kinds)](rng)


def people(rng: random.Random) -> tuple[str, str]:
    """Homes, jobs and numbers of three people."""
    three = distinct_people(rng, FIT, for_case=False)
    facts = [(p, rng.choice(sentences(block))) for p in three for block in (CITY, JOB, CODE)]
    return _about(rng, three, facts, sentences(PEOPLE_QUESTIONS))


def things(rng: random.Random) -> tuple[str, str]:
    """Things of three people, with their colours and prices."""
    three = distinct_people(rng, FIT, for_case=False)
    belongings, colours = rng.sample(THINGS, 3), rng.sample(COLOURS, 3)
    for person, thing, colour in zip(three, belongings, colours, strict=True):
        person |= {"thing": thing, "colour": colour, "price": str(rng.randrange(11, 950))}
    blocks = (THING_SENTENCES, THING_SENTENCES, DATE)
    facts = [(p, rng.choice(sentences(block))) for p in three for block in blocks]
    return _about(rng, three, facts, sentences(THING_QUESTIONS))


def items(rng: random.Random) -> tuple[str, str]:
    """A list of things, in order."""
    sample = rng.sample(THINGS, rng.randrange(5, 11))
    index = rng.randrange(len(sample) - 1)
    words = {
        "items": ", ".join(sample),
        "first": sample[0],
        "last": sample[-1],
        "one": sample[index],
        "two": sample[index + 1],
        "count": str(len(sample)),
    }
    context = [
        *_fillers(rng),
        rng.choice(sentences(LIST_SENTENCES)).format(**words),
        *_fillers(rng),
    ]
    questions = rng.sample(sentences(LIST_QUESTIONS), 3)
    return " ".join(context), "\n" + "\n".join(line.format(**words) for line in questions)


def settings(rng: random.Random) -> tuple[str, str]:
    """Values set in code, repeated in prose and as a quotation."""
    names = rng.sample(NAMES, rng.randrange(5, 9))
    lines = [f"{name} = {rng.randrange(2, 1000)}" for name in names]
    shape = rng.choice(("    self.{}", "{}", "config.{}"))
    code = [shape.format(line) for line in lines]
    head = "def __init__(self):" if "self" in shape else f"# {rng.choice(sentences(FILLER))}"
    pairs = [line.split(" = ") for line in rng.sample(lines, 3)]
    prose = [f"There `{name}` is set to {value}." for name, value in pairs]
    index = rng.randrange(len(code) - 1)
    answers = [*prose, f"The code says:\n{code[index]}\n{code[index + 1]}"]
    return "\n".join([" ".join(_fillers(rng)), head, *code]), "\n" + "\n".join(answers)


def sums(rng: random.Random) -> tuple[str, str]:
    """Prices of things, and the sum of two."""
    prices = {thing: rng.randrange(2, 300) for thing in rng.sample(THINGS, rng.randrange(3, 6))}
    date = f"{rng.choice(MONTHS)} {rng.randrange(1, 29)}"
    lines = [f"The {thing} was {price} dollars." for thing, price in prices.items()]
    first, second = rng.sample(list(prices), 2)
    answers = [
        f"Price of the {first}: {prices[first]}",
        f"The {second} and the {first} together: "
        f"{prices[second]} + {prices[first]} = {prices[second] + prices[first]}",
        f"Bought on {date}: {', '.join(prices)}",
    ]
    context = [f"The bill of {date}.", *lines, *_fillers(rng)]
    return " ".join(context), "\n" + "\n".join(answers)


def _about(
    rng: random.Random,
    three: list[dict[str, str]],
    facts: list[tuple[dict[str, str], str]],
    questions: list[str],
) -> tuple[str, str]:
    """Facts about three people between fillers, and questions about some of them."""
    lines: list[Line] = [*facts, *((None, f) for f in _fillers(rng))]
    if rng.random() < 0.5:
        rng.shuffle(lines)
    count = min(rng.randrange(4, 7), len(questions))
    chosen = [line.format(**rng.choice(three)) for line in rng.sample(questions, count)]
    return fill_templates(rng, lines), "\n" + "\n".join(chosen)


def _fillers(rng: random.Random) -> list[str]:
    return rng.sample(sentences(FILLER), rng.randrange(3, 7))
