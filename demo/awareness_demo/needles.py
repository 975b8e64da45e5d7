"""Cases whose facts are hidden in prose of other sources, at several lengths and of several kinds.

The cases of `facts.py` are all context; here a fact is a needle somewhere in 300 to 4,000 tokens
that are about other things. Names, cities, jobs and codes are those that no fit has seen; so are
the things, rooms and colours here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

from awareness_demo.facts import CASE_CITY, CASE_CODE, CASE_JOB, MEASURE
from awareness_demo.needle_templates import (
    ARRIVALS,
    BACKWARDS,
    BETWEEN,
    FEMALE,
    ITEMS,
    MALE,
    PARAPHRASED,
    PRICED,
    RELATIONS,
    ROOMS,
    SEVERAL_EXAMPLE,
    SHOPPING,
    SPREAD,
    SUM_EXAMPLE,
    SYNONYMS,
    THINGS,
)
from awareness_vllm.anchors.facts import is_case_code, sentences, with_article
from awareness_vllm.errors import BadInput

LENGTHS = (300, 1000, 2000, 4000)
PER_CELL = 12
CHARACTERS = {"crawl": 4.76, "debian-history": 3.95, "wordnet": 4.39}
"""The sources of the prose, and their characters per token of Gemma-3."""


class Needle(TypedDict):
    """A question about a context in which its facts are hidden.

    `question` ends where `answer` continues, with a leading blank; `tokens` is the context's
    length, about; `sentences` are the character ranges of the context that the answer needs.
    """

    context: str
    question: str
    answer: str
    kind: str
    tokens: int
    sentences: list[tuple[int, int]]


class Fact(NamedTuple):
    """Needles that go into the prose each at a place of its own, the sentences and lines of them
    that the answer needs, and what is asked."""

    needles: list[str]
    needed: list[str]
    question: str
    start: str
    answer: str


def _person(rng: random.Random) -> dict[str, str]:
    """A person of the measured words, with pronouns."""
    first = rng.choice(FEMALE + MALE)
    they, their = ("She", "Her") if first in FEMALE else ("He", "His")
    code = rng.choice([code for code in range(1000, 10000) if is_case_code(code)])
    job = rng.choice(MEASURE.jobs)
    return {
        "name": f"{first} {rng.choice(MEASURE.last)}",
        "city": rng.choice(MEASURE.cities),
        "job": job,
        "a_job": with_article(job),
        "article": with_article(job).split()[0],
        "code": str(code),
        "They": they,
        "they": they.lower(),
        "Their": their,
        "their": their.lower(),
    }


def _people(rng: random.Random, count: int) -> list[dict[str, str]]:
    """People of whom no two share a name, city, job or code."""
    people: list[dict[str, str]] = []
    while len(people) < count:
        person = _person(rng)
        own = {*person["name"].split(), person["city"], person["job"], person["code"]}
        if not any(own & {*p["name"].split(), p["city"], p["job"], p["code"]} for p in people):
            people.append(person)
    return people


def _pick(rng: random.Random, templates: str, values: Mapping[str, str]) -> str:
    return rng.choice(sentences(templates)).format(**values)


def single(rng: random.Random) -> Fact:
    """One fact, and one of the same kind about somebody else."""
    block, question, start, key = rng.choice(
        (
            (CASE_CITY, "In which city does {name} live?", "{name} lives in", "city"),
            (CASE_JOB, "What is the job of {name}?", "{name} works as {article}", "job"),
            (CASE_CODE, "What is the code of {name}?", "The code of {name} is", "code"),
        )
    )
    one, other = _people(rng, 2)
    needle, beside = (_pick(rng, block, {**p, "who": p["name"]}) for p in (one, other))
    asked = question.format(**one), start.format(**one)
    return Fact([needle, beside], [needle], *asked, one[key])


def several(rng: random.Random) -> Fact:
    """Where two things stand, told at two places; and a third."""
    pairs = [*zip(rng.sample(THINGS, 3), rng.sample(ROOMS, 3), strict=True)]
    needles = [f"The {thing} stands in the {room}." for thing, room in pairs]
    (a, x), (b, y) = pairs[:2]
    question = f"{SEVERAL_EXAMPLE}Where do the {a} and the {b} stand?"
    answer = f"{x}. The {b} stands in the {y}"
    return Fact(needles, needles[:2], question, f"The {a} stands in the", answer)


def paraphrased(rng: random.Random) -> Fact:
    """A fact asked for in other words; of a thing, its name is another word too."""
    key = rng.choice(tuple(PARAPHRASED))
    templates, question, start = PARAPHRASED[key]
    word = rng.choice(tuple(SYNONYMS))
    values = {
        **_person(rng),
        "word": word,
        "other": SYNONYMS[word],
        "room": rng.choice(ROOMS),
        "price": str(rng.randrange(103, 950)),
    }
    values["number"] = values["price"]
    needle = _pick(rng, templates, values)
    asked = question.format(**values), start.format(**values)
    return Fact([needle], [needle], *asked, values[key])


def backwards(rng: random.Random) -> Fact:
    """Who or what a fact is about."""
    templates, question, start, answer = BACKWARDS[rng.choice(tuple(BACKWARDS))]
    values = {**_person(rng), "thing": rng.choice(THINGS), "room": rng.choice(ROOMS)}
    needle = _pick(rng, templates, values)
    asked = question.format(**values), start.format(**values)
    return Fact([needle], [needle], *asked, answer.format(**values))


def spread(rng: random.Random) -> Fact:
    """A fact over two sentences: the first has the name, the second what is asked for."""
    templates, question, start, answer = SPREAD[rng.choice(tuple(SPREAD))]
    person = _person(rng)
    first, second = _pick(rng, ARRIVALS, person), _pick(rng, templates, person)
    between = [_pick(rng, BETWEEN, {})] if rng.random() < 1 / 3 else []
    asked = question.format(**person), start.format(**person)
    needle = " ".join([first, *between, second])
    return Fact([needle], [first, second], *asked, answer.format(**person))


def two_hop(rng: random.Random) -> Fact:
    """Two facts at two places: whom the first one names, the second is about."""
    one, other, third = _people(rng, 3)
    relation = rng.choice(RELATIONS)
    link = f"The {relation} of {one['name']} is {other['name']}."
    needle, beside = (_pick(rng, CASE_CITY, {**p, "who": p["name"]}) for p in (other, third))
    asked = f"the {relation} of {one['name']}"
    question = f"In which city does {asked} live?"
    start = f"T{asked[1:]} lives in"
    return Fact([link, needle, beside], [link, needle], question, start, other["city"])


def in_list(rng: random.Random) -> Fact:
    """The next item of a list, of a sentence or of lines of their own; the answer repeats the list
    from its beginning, as it is written."""
    person, items = _person(rng), rng.sample(ITEMS, 5)
    at = rng.randrange(1, 4)
    question = f"What is on the list of {person['name']}?"
    if rng.random() < 0.5:
        written = f"{', '.join(items[:-1])} and {items[-1]}"
        needle = _pick(rng, SHOPPING, {**person, "items": written})
        start = f"{', '.join(items[:at])},"
        return Fact([f"The list was long. {needle}"], [needle], question, start, items[at])
    lines = [f"- {item}" for item in items]
    needle = "\n".join([f"\nThe list of {person['name']}:", *lines, ""])
    start = "\n".join(["", *lines[:at], "-"])
    return Fact([needle], lines[at - 1 : at + 1], question, start, items[at])


def sums(rng: random.Random) -> Fact:
    """The sum of two small prices that stand at two places; the answer writes it out."""
    things = rng.sample(THINGS, 3)
    numbers = rng.sample(range(2, 8), 3)
    while sum(numbers[:2]) > 9:
        numbers = rng.sample(range(2, 8), 3)
    needles = [
        _pick(rng, PRICED, {"thing": thing, "number": str(number)})
        for thing, number in zip(things, numbers, strict=True)
    ]
    (a, b), (x, y) = things[:2], numbers[:2]
    question = f"{SUM_EXAMPLE}What do the {a} and the {b} cost together?"
    answer = f"{x} dollars. The {b} cost {y} dollars. {x} + {y} = {x + y}"
    return Fact(needles, needles[:2], question, f"The {a} cost", answer)


KINDS: dict[str, Callable[[random.Random], Fact]] = {
    "single": single,
    "several": several,
    "paraphrased": paraphrased,
    "backwards": backwards,
    "spread": spread,
    "two-hop": two_hop,
    "list": in_list,
    "sum": sums,
}


def needles(
    prose: Mapping[str, Sequence[str]], seed: int, per_cell: int = PER_CELL
) -> list[Needle]:
    """`per_cell` cases of each kind and length, kinds and lengths in turn.

    Cases 2n and 2n + 1 are of one kind and length: those of even index and those of odd index are
    two samples of the same.

    Args:
        prose: Texts of each source in CHARACTERS.

    Raises:
        BadInput: a source is missing.
    """
    if missing := [source for source in CHARACTERS if not prose.get(source)]:
        raise BadInput("no prose to hide facts in", found=f"no texts of {', '.join(missing)}")
    return [
        _needle(
            random.Random(f"needle {seed} {kind} {tokens} {number}"), kind, tokens, number, prose
        )
        for pair in range(0, per_cell, 2)
        for tokens in LENGTHS
        for kind in KINDS
        for number in range(pair, min(pair + 2, per_cell))
    ]


def _needle(
    rng: random.Random, kind: str, tokens: int, number: int, prose: Mapping[str, Sequence[str]]
) -> Needle:
    source = tuple(CHARACTERS)[number % len(CHARACTERS)]
    size = int(tokens * CHARACTERS[source])
    while True:
        fact = KINDS[kind](rng)
        parts = _parts(rng, prose[source], size - sum(map(len, fact.needles)))
        # The first at a depth that differs from case to case, the others anywhere.
        first = int((number % PER_CELL + rng.random()) / PER_CELL * (len(parts) + 1))
        places = [first, *(rng.randrange(len(parts) + 1) for _ in fact.needles[1:])]
        for place, needle in sorted(zip(places, fact.needles, strict=True), reverse=True):
            parts.insert(place, needle)
        context = _joined(parts)
        ranges = _ranges(context, fact)
        if _is_answered_once(context, ranges, fact):
            return Needle(
                context=context,
                question=f"\nQuestion: {fact.question}\nAnswer: {fact.start}".replace(
                    ": \n", ":\n"
                ),
                answer=f" {fact.answer}",
                kind=kind,
                tokens=tokens,
                sentences=ranges,
            )


def _parts(rng: random.Random, texts: Sequence[str], size: int) -> list[str]:
    """Sentences and lines of about `size` characters in all, from texts in a drawn order; of the
    first one from anywhere."""
    parts: list[str] = []
    begin = None
    for text in rng.sample(list(texts), len(texts)):
        sentences = re.split(r"(?<=[.!?])(?=\s)|(?<=\n)(?=\S)", text)
        if begin is None:
            begin = rng.randrange(len(sentences))
            sentences = sentences[begin:]
        for part in sentences:
            if size <= 0:
                return parts
            parts.append(part)
            size -= len(part)
    return parts


def _joined(parts: Sequence[str]) -> str:
    """Parts with a blank between those that have none."""
    text = ""
    for part in parts:
        apart = not text or text[-1].isspace() or part[:1].isspace()
        text += part if apart else f" {part}"
    return text.strip()


def _ranges(context: str, fact: Fact) -> list[tuple[int, int]]:
    """The character ranges of the needed sentences, each within its needle."""
    ranges = []
    for sentence in fact.needed:
        needle = next(needle for needle in fact.needles if sentence in needle).strip()
        begin = context.index(needle) + needle.index(sentence)
        ranges.append((begin, begin + len(sentence)))
    return ranges


def _is_answered_once(context: str, ranges: Sequence[tuple[int, int]], fact: Fact) -> bool:
    """Whether the needed sentences have the words of the answer, and nothing else has."""
    rest = context
    for begin, end in sorted(ranges, reverse=True):
        rest = rest[:begin] + rest[end:]
    needed = " ".join(context[b:e] for b, e in ranges)
    if "+" in fact.answer:
        # A sum's numbers are so small that they stand anywhere: its sentences must stand once.
        return all(context.count(sentence) == 1 for sentence in fact.needed)
    known = re.findall(r"\w{3,}", fact.question)
    words = [word for word in re.findall(r"\w{3,}", fact.answer) if word in needed]
    answer = [word for word in words if word not in known]
    return not any(re.search(rf"\b{word}\b", rest, re.IGNORECASE) for word in answer)
