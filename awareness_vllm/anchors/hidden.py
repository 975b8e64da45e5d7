"""Facts hidden in prose, and lines that restate them or ask for them in other words.

A fact stands in one sentence, in two of which only the first has the name, at two places of the
text, or in a list. Lines ask forwards and backwards. No sentence, line, thing or room is one of the
measured cases' (`awareness_demo`), as no name, city, job or code is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from awareness_vllm.anchors.facts import (
    CITY,
    CODE,
    COLOURS,
    FILLER,
    JOB,
    THINGS,
    distinct_people,
    sentences,
)
from awareness_vllm.anchors.recall import LIST_SENTENCES, NAMES, THING_SENTENCES
from awareness_vllm.anchors.words import FIT, words_of

Range = tuple[int, int]
"""Characters begin … end-1 of a text."""

ASKS = {
    "city": """
Where does {name} reside? In {city}.|Home town of {name}: {city}|To see {name}, go to {city}.
Which place does {name} call home? {city}|The address of {name} is in {city}.
Who resides in {city}? {name}|From {city} comes {name}.|Whose home is {city}? It is {name}'s.
The one with a home in {city} is {name}.|Whom would you meet in {city}? {name}
""",
    "job": """
How does {name} earn money? As {a_job}.|The profession of {name}: {job}|{name} is {a_job}.
What is {name} by trade? {job}|What does it say of {name}'s work? {a_job}
Whose profession is that of {a_job}? {name}'s.|The {job} of whom we read is {name}.
Which person is {a_job}? {name}|Name the {job}: {name}
""",
    "code": """
Which digits go with {name}? {code}|{name} has {code}.|Number of {name}: {code}
What would {name} dial or show? {code}|The digits beside {name} were {code}.
Whose number is {code}? It is {name}'s.|{code} stands for {name}.|To whom does {code} lead? {name}
""",
    "thing": """
Which colour has the {thing} of {name}? {colour}|{name} has a {colour} {thing}.
Whose is the {thing}? {name}'s.|The {colour} thing was the {thing}.|The owner of the {thing}: {name}
""",
    "place": """
Where was the {thing}? In the {room}.|The {room} is where the {thing} is.
What was in the {room}? The {thing}.|To find the {thing}, go into the {room}.
""",
    "price": """
How much was the {thing}? {price} dollars|{price} dollars were paid for the {thing}.
For what did one pay {price} dollars? For the {thing}.|Price of the {thing}: {price}
""",
}
PLACE = """
Somebody has put the {thing} into the {room}.|The {thing} is kept in the {room}.
In the {room} there was a {thing}.|They left the {thing} behind in the {room}.
"""
PRICE = """
The {thing} was sold for {price} dollars.
Nobody would give more than {price} dollars for the {thing}.
At {price} dollars the {thing} was a bargain.
"""
ROOMS = words_of("kitchen cellar hall bedroom office barn tower library loft shed bathroom porch")
FIRST = """
{name} had been invited as well.|One of them was {name}.|That was the year of {name}.
Somebody mentioned {name}.|The next on the list was {name}.|A guest, {name}, asked for a chair.
"""
SECOND = {
    "city": """
{They} came from {city}.|{They} was on the way home to {city}.|{Their} family had moved to {city}.
{They} had grown up in {city}, and stayed there.
""",
    "job": """
{They} had become {a_job}.|{Their} trade was that of {a_job}.|As {a_job}, {they} knew about it.
""",
    "code": """
{Their} locker opened with {code}.|The parcel for {them} was number {code}.
{They} could be reached under {code}.
""",
}
RELATIONS = words_of(
    "sister brother boss friend uncle tenant deputy nephew colleague guardian aunt"
)
LINK = "The {relation} of {name} is {other}.|{other} is the {relation} of {name}."
FURTHER = {
    "city": "Where does the {relation} of {name} reside? In {city}.|"
    "From {city} comes the {relation} of {name}.",
    "job": "What is the {relation} of {name} by trade? {job}|"
    "The profession of the {relation} of {name}: {job}",
}
LIST_ASKS = """
The whole list again: {items}.|First came the {first}, last the {last}.
What came after the {one}? The {two}.|Before the {two} stood the {one}.|How many in all? {count}
"""
VALUE_ASKS = """
What is `{key}` set to? {value}|The setting {key} has the value {value}.|{key} = {value}
Which setting is {value}? `{key}`
"""
SUM_ASKS = """
The {a} and the {b} together: {x} + {y} = {sum}|{a} and {b}: {x} + {y} = {sum} dollars
"""


@dataclass(frozen=True)
class Needle:
    """Sentences, or lines, that stand together, and what divides them."""

    parts: tuple[str, ...]
    divider: str = " "


@dataclass(frozen=True)
class Ask:
    """A line about a text, and the numbers of the needles that it is about."""

    line: str
    about: tuple[int, ...]


Facts = tuple[list[Needle], list[Ask]]


def _pick(rng: random.Random, templates: str, values: dict[str, str]) -> str:
    return rng.choice(sentences(templates)).format(**values)


def _lines(rng: random.Random, templates: str, values: dict[str, str], count: int) -> list[str]:
    """Some lines of a block; a question and its answer are marked as such now and then."""
    chosen = rng.sample(sentences(templates), min(count, len(sentences(templates))))
    lines = [template.format(**values) for template in chosen]
    style = rng.choice(("{}? {}", "Q: {}? A: {}", "Q: {}?\nA: {}", "- {}?\n- {}"))
    return [style.format(*line.split("? ", 1)) if "? " in line else line for line in lines]


def _people(rng: random.Random) -> list[dict[str, str]]:
    people = distinct_people(rng, FIT, for_case=False)
    for person in people:
        they, their, them = rng.choice((("She", "Her", "her"), ("He", "His", "him")))
        person |= {"They": they, "they": they.lower(), "Their": their, "them": them}
        person["who"] = person["name"]
    return people


def single(rng: random.Random) -> Facts:
    """A fact about each of three people, in a sentence."""
    blocks = {"city": CITY, "job": JOB, "code": CODE}
    keys = (
        rng.choices(tuple(blocks), k=3) if rng.random() < 0.5 else [rng.choice(tuple(blocks))] * 3
    )
    needles, asks = [], []
    for number, (person, key) in enumerate(zip(_people(rng), keys, strict=True)):
        details = {"year": str(rng.randrange(1951, 2025)), "years": str(rng.randrange(2, 40))}
        needles.append(Needle((_pick(rng, blocks[key], person | details),)))
        asks += [Ask(line, (number,)) for line in _lines(rng, ASKS[key], person, 2)]
    return needles, asks


def spread(rng: random.Random) -> Facts:
    """Facts over two sentences, now and then with a third between them."""
    needles, asks = [], []
    for number, person in enumerate(_people(rng)[: rng.randrange(1, 4)]):
        key = rng.choice(tuple(SECOND))
        between = rng.sample(sentences(FILLER), rng.random() < 0.3)
        parts = (_pick(rng, FIRST, person), *between, _pick(rng, SECOND[key], person))
        needles.append(Needle(parts))
        asks += [Ask(line, (number,)) for line in _lines(rng, ASKS[key], person, 2)]
    return needles, asks


def two_hop(rng: random.Random) -> Facts:
    """Whom one sentence names, another one is about, somewhere else."""
    one, other, third = _people(rng)
    key = rng.choice(tuple(FURTHER))
    block = {"city": CITY, "job": JOB}[key]
    details = {"year": str(rng.randrange(1951, 2025)), "years": str(rng.randrange(2, 40))}
    values = other | {
        "name": one["name"],
        "other": other["name"],
        "relation": rng.choice(RELATIONS),
    }
    needles = [
        Needle((_pick(rng, LINK, values),)),
        *(Needle((_pick(rng, block, person | details),)) for person in (other, third)),
    ]
    asks = [Ask(line, (0, 1)) for line in _lines(rng, FURTHER[key], values, 2)]
    return needles, [*asks, *(Ask(line, (2,)) for line in _lines(rng, ASKS[key], third, 1))]


def belongings(rng: random.Random) -> Facts:
    """Things: their owners, places and prices."""
    needles, asks = [], []
    colours, rooms = rng.sample(COLOURS, 3), rng.sample(ROOMS, 3)
    for number, (person, thing) in enumerate(zip(_people(rng), rng.sample(THINGS, 3), strict=True)):
        values = person | {"thing": thing, "colour": colours[number], "room": rooms[number]}
        values["price"] = str(rng.randrange(11, 950))
        key, block = rng.choice((("thing", THING_SENTENCES), ("place", PLACE), ("price", PRICE)))
        needles.append(Needle((_pick(rng, block, values),)))
        asks += [Ask(line, (number,)) for line in _lines(rng, ASKS[key], values, 2)]
    return needles, asks


def in_list(rng: random.Random) -> Facts:
    """A list of things, in a sentence or in lines."""
    things = rng.sample(THINGS, rng.randrange(4, 9))
    at = rng.randrange(len(things) - 1)
    values = {"items": ", ".join(things), "first": things[0], "last": things[-1]}
    values |= {"one": things[at], "two": things[at + 1], "count": str(len(things))}
    needle = Needle((_pick(rng, LIST_SENTENCES, values),))
    if rng.random() < 0.5:
        needle = Needle(("\nWhat there was:", *(f"* {thing}" for thing in things), ""), "\n")
    return [needle], [Ask(line, (0,)) for line in _lines(rng, LIST_ASKS, values, 3)]


def settings(rng: random.Random) -> Facts:
    """Values set in code."""
    values = {name: str(rng.randrange(2, 1000)) for name in rng.sample(NAMES, rng.randrange(4, 8))}
    shape = rng.choice(("    {} = {}", "{}: {}", '"{}": {},', "{} = {}"))
    lines = [shape.format(name, value) for name, value in values.items()]
    asks = []
    for key in rng.sample(list(values), 3):
        about = {"key": key, "value": values[key]}
        asks += [Ask(line, (0,)) for line in _lines(rng, VALUE_ASKS, about, 1)]
    return [Needle(("\n# settings", *lines, ""), "\n")], asks


def sums(rng: random.Random) -> Facts:
    """The sum of two prices that stand at two places."""
    high = rng.choice((10, 100))
    things = rng.sample(THINGS, 3)
    prices = {thing: rng.randrange(2, high) for thing in things}
    needles = [
        Needle((_pick(rng, PRICE, {"thing": thing, "price": str(price)}),))
        for thing, price in prices.items()
    ]
    a, b = rng.sample(range(3), 2)
    x, y = prices[things[a]], prices[things[b]]
    values = {"a": things[a], "b": things[b], "x": str(x), "y": str(y), "sum": str(x + y)}
    asks = [Ask(line, (a, b)) for line in _lines(rng, SUM_ASKS, values, 1)]
    one = {"thing": things[a], "price": str(x)}
    return needles, [*asks, *(Ask(line, (a,)) for line in _lines(rng, ASKS["price"], one, 1))]


KINDS: tuple[tuple[Callable[[random.Random], Facts], int], ...] = (
    (single, 4), (spread, 3), (two_hop, 1), (belongings, 2), (in_list, 1), (settings, 1), (sums, 1),
)  # fmt: skip
"""The kinds of facts, and how often each comes."""
BORDER = re.compile(r"(?<=[.!?])\s+(?=\S)|\n+(?=\S)")
"""Where a sentence may be put into prose."""


def hidden_facts(rng: random.Random, prose: str) -> tuple[str, str, list[list[Range]]]:
    """A text of prose with facts in it; a continuation that restates some of them; and of each of
    its lines the ranges of the sentences that it is about, in their order in the text."""
    functions, weights = zip(*KINDS, strict=True)
    needles, asks = rng.choices(functions, weights)[0](rng)
    text, ranges = hide(rng, prose, needles)
    chosen = rng.sample(asks, min(len(asks), rng.randrange(3, 7)))
    about = [sorted({r for number in ask.about for r in ranges[number]}) for ask in chosen]
    return text, "\n" + "\n".join(ask.line for ask in chosen), about


def hide(
    rng: random.Random, prose: str, needles: Sequence[Needle]
) -> tuple[str, list[list[Range]]]:
    """The prose with needles between its sentences, and the ranges of each needle's sentences."""
    borders = [0, *(match.end() for match in BORDER.finditer(prose)), len(prose)]
    places = sorted((rng.choice(borders), rng.random(), n) for n in range(len(needles)))
    text, begin = "", 0
    ranges: list[list[Range]] = [[] for _ in needles]
    for place, _, number in places:
        text += prose[begin:place]
        begin, needle = place, needles[number]
        if text and not text[-1].isspace():
            text += " "
        for i, part in enumerate(needle.parts):
            text += needle.divider if i else ""
            at = len(text)
            text += part
            if part.strip():
                ranges[number].append((at, len(text)))
        text += "" if text.endswith("\n") else " "
    return (text + prose[begin:]).rstrip(), ranges
