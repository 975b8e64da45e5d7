"""Calibration texts whose continuation must copy specifics from the context.

Ordinary prose hardly rewards recall: what comes next can mostly be guessed. Here the continuation
restates, or asks for, what only the context gives, in other words than the context's: facts about
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
    sentences,
    tell,
    unlike_people,
)
from awareness_vllm.anchors.words import FIT

ASKED = """
Q: Where is {name} at home? A: {city}|Q: Who is {name}? A: {a_job} from {city}
Q: Which number belongs to {name}? A: {code}|Q: What does {name} do? A: {name} is {a_job}.
Home of {name}: {city}|Occupation of {name}: {job}|Number of {name}: {code}
{name} ({job}), {city}, {code}|The number of {name} was {code}.|{name} comes from {city}.
Q: Who has the number {code}? A: {name}|Q: Who is the {job}? A: {name}
"""
OWNED = """
{who} owns a {colour} {thing}.|{who} keeps a {colour} {thing} in the cellar.
{who} sold a {colour} {thing} for {price} dollars.|The {colour} {thing} belongs to {who}.
The {thing} of {who} is {colour} and cost {price} dollars.
"""
OWNED_ASKED = """
Q: Which colour has the {thing} of {name}? A: {colour}|Owner of the {thing}: {name}
Q: What does {name} have? A: a {colour} {thing}|Whose is the {colour} {thing}? It is {name}'s.
"""
LISTED = """
What to pack: {items}.|On the table lay {items}.|The shop sells {items}.
The order, in turn: {items}.
"""
LISTED_ASKED = """
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
    kinds: tuple[Callable[[random.Random], tuple[str, str]], ...] = (things, listed, settings, sums)
    return people(rng) if number % 2 == 0 else kinds[number // 2 % len(kinds)](rng)


def people(rng: random.Random) -> tuple[str, str]:
    """Where three people live, what they do, which number they have."""
    three = unlike_people(rng, FIT, for_case=False)
    told = [(p, rng.choice(sentences(block))) for p in three for block in (CITY, JOB, CODE)]
    return _about(rng, three, told, sentences(ASKED))


def things(rng: random.Random) -> tuple[str, str]:
    """What three people own, of which colour, at which price."""
    three = unlike_people(rng, FIT, for_case=False)
    owned, colours = rng.sample(THINGS, 3), rng.sample(COLOURS, 3)
    for person, thing, colour in zip(three, owned, colours, strict=True):
        person |= {"thing": thing, "colour": colour, "price": str(rng.randrange(11, 950))}
    blocks = (OWNED, OWNED, DATE)
    told = [(p, rng.choice(sentences(block))) for p in three for block in blocks]
    return _about(rng, three, told, sentences(OWNED_ASKED))


def listed(rng: random.Random) -> tuple[str, str]:
    """Things in an order."""
    items = rng.sample(THINGS, rng.randrange(5, 11))
    place = rng.randrange(len(items) - 1)
    words = {
        "items": ", ".join(items),
        "first": items[0],
        "last": items[-1],
        "one": items[place],
        "two": items[place + 1],
        "count": str(len(items)),
    }
    context = [*_fillers(rng), rng.choice(sentences(LISTED)).format(**words), *_fillers(rng)]
    asked = rng.sample(sentences(LISTED_ASKED), 3)
    return " ".join(context), "\n" + "\n".join(line.format(**words) for line in asked)


def settings(rng: random.Random) -> tuple[str, str]:
    """Values that code sets, and the same code quoted."""
    names = rng.sample(NAMES, rng.randrange(5, 9))
    lines = [f"{name} = {rng.randrange(2, 1000)}" for name in names]
    shape = rng.choice(("    self.{}", "{}", "config.{}"))
    code = [shape.format(line) for line in lines]
    head = "def __init__(self):" if "self" in shape else f"# {rng.choice(sentences(FILLER))}"
    quoted = rng.sample(lines, 3)
    told = [f"There `{line.split(' = ')[0]}` is set to {line.split(' = ')[1]}." for line in quoted]
    place = rng.randrange(len(code) - 1)
    asked = [*told, f"The code says:\n{code[place]}\n{code[place + 1]}"]
    return "\n".join([" ".join(_fillers(rng)), head, *code]), "\n" + "\n".join(asked)


def sums(rng: random.Random) -> tuple[str, str]:
    """What things cost, and what together."""
    bought = {thing: rng.randrange(2, 300) for thing in rng.sample(THINGS, rng.randrange(3, 6))}
    date = f"{rng.choice(MONTHS)} {rng.randrange(1, 29)}"
    said = [f"The {thing} was {price} dollars." for thing, price in bought.items()]
    first, second = rng.sample(list(bought), 2)
    asked = [
        f"Price of the {first}: {bought[first]}",
        f"The {second} and the {first} together: "
        f"{bought[second]} + {bought[first]} = {bought[second] + bought[first]}",
        f"Bought on {date}: {', '.join(bought)}",
    ]
    context = [f"The bill of {date}.", *said, *_fillers(rng)]
    return " ".join(context), "\n" + "\n".join(asked)


def _about(
    rng: random.Random,
    three: list[dict[str, str]],
    told: list[tuple[dict[str, str], str]],
    questions: list[str],
) -> tuple[str, str]:
    """What is told of three people between fillers, and some of it asked."""
    lines: list[tuple[dict[str, str] | None, str]] = [*told, *((None, f) for f in _fillers(rng))]
    if rng.random() < 0.5:
        rng.shuffle(lines)
    count = min(rng.randrange(4, 7), len(questions))
    asked = [line.format(**rng.choice(three)) for line in rng.sample(questions, count)]
    return tell(rng, lines), "\n" + "\n".join(asked)


def _fillers(rng: random.Random) -> list[str]:
    return rng.sample(sentences(FILLER), rng.randrange(3, 7))
