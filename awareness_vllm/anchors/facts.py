"""The people, things and sentence templates of generated texts that state specific facts."""

from __future__ import annotations

import random

from awareness_vllm.anchors.words import Words, words_of

Line = tuple[dict[str, str] | None, str]
"""The person that a sentence is about, None for filler, and the sentence's template."""

# {who}: full or first name; {a_job}: the job with its article.
CITY = """
{who} has a small flat in {city}.|Since {year}, {who} has been living in {city}.
In {city} you may run into {who} at the market.|{who} was born in {city} and still calls it home.
After many moves, {who} settled down in {city}.|{city} is where {who} grew up.
The family of {who} comes from {city}.|Letters to {who} go to an address in {city}.
{who}, a resident of {city}, likes the winters there.|{who} took the night train back to {city}.
"""
JOB = """
{who} is {a_job} by trade.|For {years} years, {who} has been {a_job}.
{who} trained as {a_job} and never regretted it.|As {a_job}, {who} gets up early.
Most people know {who} as {a_job}.|{who} earns a living as {a_job}.
On the form, under occupation, {who} wrote "{job}".|{who} gave up teaching to become {a_job}.
The agency sent {who}, {a_job} with good references.
"""
CODE = """
{who} opens the locker with {code}.|{who}'s badge carries the number {code}.
To reach {who}, dial extension {code}.|{code} is the membership number of {who}.
{who} chose {code} as the combination.|The file on {who} is numbered {code}.
The parcel for {who} has the pickup number {code}.
At the desk, {who} gave the code {code} and was let in.
"""
DATE = """
{who} was hired on {date}, {year}.|The appointment of {who} is on {date}.
{who} was born on {date}, {year}.|On {date}, {who} leaves for {city}.
{who} married in {city} on {date}, {year}.|The lease of {who} ends on {date}.
"""
FILLER = """
The weather has been mild for the season.|Nobody at the meeting objected.
That is all there is to say about it.|The minutes were read and approved.
There was coffee, and later there was cake.|The rest is a matter of record.
It took longer than anyone had expected.|A copy was kept in the office.
Much has changed since then, and much has not.|Those who were there remember it well.
The details were checked twice.|Some of the neighbours tell it differently.|The bus was late again.
Several questions were left for another day.|It rained in the afternoon.
"""
THINGS = words_of(
    """
    bicycle kettle lamp guitar suitcase umbrella carpet clock sofa camera tent piano vase coat
    scarf canoe typewriter mirror wardrobe telescope backpack teapot blanket scooter drum
    """
)
COLOURS = words_of(
    """
    red blue green yellow black white brown grey orange purple pink silver golden turquoise
    violet crimson beige
    """
)
MONTHS = words_of(
    """
    January February March April May June July August September October November December
    """
)


def is_case_code(code: int) -> bool:
    """Whether a four-digit code is reserved for cases: one in seven, and none in the texts."""
    return code % 7 == 3


def sentences(templates: str) -> list[str]:
    """The sentence templates of a block."""
    return [part for line in templates.split("\n") if line for part in line.split("|")]


def with_article(job: str) -> str:
    """A job with "a" or "an"."""
    return ("an " if job[0] in "aeiou" else "a ") + job


def make_person(rng: random.Random, words: Words, *, for_case: bool) -> dict[str, str]:
    code = rng.randrange(1000, 10000)
    while is_case_code(code) != for_case:
        code = rng.randrange(1000, 10000)
    job = rng.choice(words.jobs)
    return {
        "name": f"{rng.choice(words.first)} {rng.choice(words.last)}",
        "city": rng.choice(words.cities),
        "job": job,
        "a_job": with_article(job),
        "code": str(code),
    }


def make_details(rng: random.Random) -> dict[str, str]:
    return {
        "thing": rng.choice(THINGS),
        "colour": rng.choice(COLOURS),
        "price": str(rng.randrange(3, 950)),
        "date": f"{rng.choice(MONTHS)} {rng.randrange(1, 29)}",
        "year": str(rng.randrange(1951, 2025)),
        "years": str(rng.randrange(2, 40)),
    }


def distinct_people(rng: random.Random, words: Words, *, for_case: bool) -> list[dict[str, str]]:
    """Three people without a common name, city, job or code, so that one answer is right."""
    people: list[dict[str, str]] = []
    while len(people) < 3:
        person = make_person(rng, words, for_case=for_case)
        taken = {word for other in people for word in _values(other)}
        if not taken & _values(person):
            people.append(person)
    return people


def _values(person: dict[str, str]) -> set[str]:
    return {*person["name"].split(), person["city"], person["job"], person["code"]}


def fill_templates(rng: random.Random, lines: list[Line]) -> str:
    """A text of templates: a person's full name the first time, later mostly the first name."""
    known: set[str] = set()
    filled = []
    for person, template in lines:
        if person is None:
            filled.append(template)
            continue
        name = person["name"]
        short = name in known and rng.random() < 0.7
        known.add(name)
        # A person's own facts win over the details.
        values = make_details(rng) | person | {"who": name.split()[0] if short else name}
        filled.append(template.format(**values))
    return " ".join(filled)
