"""Generated texts that state specific facts, and cases that ask for such facts.

Ordinary prose has few specifics that cannot be guessed; a map fitted on it alone keeps the gist and
loses every name and number. There are texts to fit on (`fact_texts`) and cases to measure on
(`fact_cases`), which share no name, city, job, code or sentence.
"""

from __future__ import annotations

import random
from typing import TypedDict

from awareness_vllm.anchors.words import FIT, MEASURE, Words, words_of
from awareness_vllm.errors import BadInput

CASE_CHARACTERS = 900
KINDS = ("city", "job", "code")
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
THING = """
{who} bought a {colour} {thing} for {price} dollars.|{who} owns a {colour} {thing}.
The {colour} {thing} in the hall belongs to {who}.
{who} paid {price} dollars for the {thing}, which is {colour}.
The {thing} that {who} lost was {colour}.
For the birthday on {date}, {who} received a {colour} {thing}.
{who} sold the old {thing} and kept the {colour} one, worth {price} dollars.
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
OPENING = """
Notes on some of our members.|From the register.|What the visitors told us.
A few people worth knowing.|Minutes of the spring meeting.|Who is who.|Summary of the interviews.
People on the second floor.
"""
RECORD = """
Name: {name}|City: {city}|Occupation: {job}|Code: {code}|Date: {date}, {year}
Item: {colour} {thing}|Price: {price} dollars
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

CASE_CITY = """
{who} moved to {city} years ago and never left.
{who} spends every evening by the river in {city}.
You will find {who} in the old quarter of {city}.|{city} has been home to {who} for a decade.
{who} rents two rooms above a shop in {city}.|Everyone who visits {who} has to travel to {city}.
"""
CASE_JOB = """
{who} makes a living as {a_job}.|{who} found employment as {a_job}.
{who} is employed as {a_job} these days.|{who} spends the working day as {a_job}.
It is as {a_job} that {who} pays the bills.|{who} has a reputation as a first-rate {job}.
"""
CASE_CODE = """
The number on the card of {who} reads {code}.|{who} was assigned the code {code}.
{who} types {code} at the gate.|In the ledger, the code {code} stands next to {who}.
{code} is the access code that belongs to {who}.|When asked for a code, {who} answers {code}.
"""
CASE_FILLER = """
It is a quiet life, by all accounts.|The evenings are spent reading.|Visitors are always welcome.
A cousin came to stay for the summer.|There are two cats in the house.
Nothing else of note happened that year.|Friends say that little has changed.
The garden needs some work.|Holidays are spent by the sea.|The old car still runs, more or less.
On Sundays there is soup.|The story could end here.|Nobody in the street has much to complain about.
The roof was mended before the first snow.|Now and then a postcard arrives from abroad.
"""
QUESTIONS = {
    "city": "\nQuestion: In which city does {name} live?\nAnswer: {name} lives in",
    "job": "\nQuestion: What is the job of {name}?\nAnswer: {name} works as {article}",
    "code": "\nQuestion: What is the code of {name}?\nAnswer: The code of {name} is",
}


class Case(TypedDict):
    """A question about a context. `question` ends where `answer` continues, with a leading blank;
    `kind` is one of KINDS."""

    context: str
    question: str
    answer: str
    kind: str


def fact_texts(count: int, seed: int, characters: int = 1500) -> list[str]:
    """`count` documents of about `characters` characters, each about several people and things.

    Raises:
        BadInput: `count` is negative or `characters` is not positive.
    """
    if count < 0 or characters < 1:
        raise BadInput("cannot write fact texts", found=(count, characters), expected="counts")
    return [_text(random.Random(f"fit {seed} {i}"), characters) for i in range(count)]


def fact_cases(count: int, seed: int) -> list[Case]:
    """`count` cases, of the kinds city, job and code in turn.

    Each context has about 900 characters and states city, job and code of three people; the
    question asks for one of these nine facts in other words.

    Raises:
        BadInput: `count` is negative.
    """
    if count < 0:
        raise BadInput("cannot write fact cases", found=count, expected="0 or more")
    return [_case(random.Random(f"measure {seed} {i}"), KINDS[i % 3]) for i in range(count)]


def is_case_code(code: int) -> bool:
    """Whether a four-digit code is reserved for cases: one in seven, and none in the texts."""
    return code % 7 == 3


def sentences(templates: str) -> list[str]:
    """The sentence templates of a block."""
    return [part for line in templates.split("\n") if line for part in line.split("|")]


def with_article(job: str) -> str:
    """A job with "a" or "an"."""
    return ("an " if job[0] in "aeiou" else "a ") + job


def _person(rng: random.Random, words: Words, *, for_case: bool) -> dict[str, str]:
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


def _details(rng: random.Random) -> dict[str, str]:
    return {
        "thing": rng.choice(THINGS),
        "colour": rng.choice(COLOURS),
        "price": str(rng.randrange(3, 950)),
        "date": f"{rng.choice(MONTHS)} {rng.randrange(1, 29)}",
        "year": str(rng.randrange(1951, 2025)),
        "years": str(rng.randrange(2, 40)),
    }


def _text(rng: random.Random, characters: int) -> str:
    parts = [rng.choice(sentences(OPENING))]
    while sum(map(len, parts)) + len(parts) < characters:
        write = rng.choices((_paragraph, _list, _record), (6, 1, 1))[0]
        parts.append(write(rng))
    return "\n\n".join(parts)


def _paragraph(rng: random.Random) -> str:
    """Prose about one person, or about two whose facts are interleaved."""
    people = [_person(rng, FIT, for_case=False) for _ in range(rng.choice((1, 1, 2)))]
    lines: list[Line] = []
    for person in people:
        blocks = rng.sample((CITY, JOB, CODE, THING, DATE), rng.randrange(3, 6))
        lines += [(person, rng.choice(sentences(block))) for block in blocks]
    lines += [(None, line) for line in rng.sample(sentences(FILLER), rng.randrange(1, 3))]
    if rng.random() < 0.5:
        rng.shuffle(lines)
    return fill_templates(rng, lines)


def _list(rng: random.Random) -> str:
    """One line for each of several people."""
    people = [_person(rng, FIT, for_case=False) for _ in range(rng.randrange(3, 7))]
    line = rng.choice(
        (
            "- {name}, {job}, {city} ({code})",
            "{name}: {city}, {code}",
            "* {code} – {name} – {job}",
            "{name} | {job} | {city} | {code}",
        )
    )
    return "\n".join(line.format(**person) for person in people)


def _record(rng: random.Random) -> str:
    """Key-value lines about one person."""
    person = _person(rng, FIT, for_case=False) | _details(rng)
    lines = sentences(RECORD)
    chosen = [lines[0], *rng.sample(lines[1:], rng.randrange(3, len(lines)))]
    return "\n".join(chosen).format(**person)


def _case(rng: random.Random, kind: str) -> Case:
    people = distinct_people(rng, MEASURE, for_case=True)
    fillers = sentences(CASE_FILLER)
    rng.shuffle(fillers)
    paragraphs: list[list[Line]] = [
        [(person, rng.choice(sentences(block))) for block in (CASE_CITY, CASE_JOB, CASE_CODE)]
        for person in people
    ]
    for paragraph in paragraphs:
        rng.shuffle(paragraph)

    def context() -> str:
        # The same draws each time, so that only the filler added below changes the length.
        fixed = random.Random(0)
        return "\n\n".join(fill_templates(fixed, paragraph) for paragraph in paragraphs)

    while fillers and len(context()) < CASE_CHARACTERS:
        paragraph = min(paragraphs, key=len)
        paragraph.insert(rng.randrange(1, len(paragraph) + 1), (None, fillers.pop()))
    person = rng.choice(people)
    question = QUESTIONS[kind].format(name=person["name"], article=person["a_job"].split(" ")[0])
    return Case(context=context(), question=question, answer=f" {person[kind]}", kind=kind)


def distinct_people(rng: random.Random, words: Words, *, for_case: bool) -> list[dict[str, str]]:
    """Three people without a common name, city, job or code, so that one answer is right."""
    people: list[dict[str, str]] = []
    while len(people) < 3:
        person = _person(rng, words, for_case=for_case)
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
        values = _details(rng) | person | {"who": name.split()[0] if short else name}
        filled.append(template.format(**values))
    return " ".join(filled)
