"""Generated texts that state specific facts, and cases that ask for such facts.

Ordinary prose has few specifics that cannot be guessed; a map fitted on it alone keeps the gist and
loses every name and number. There are texts to fit on (`fact_texts`) and cases to measure on
(`fact_cases`), which share no name, city, job, code or sentence.
"""

from __future__ import annotations

import random
from typing import TypedDict

from awareness_vllm.anchors.facts import (
    CITY,
    CODE,
    DATE,
    FILLER,
    JOB,
    Line,
    distinct_people,
    fill_templates,
    make_details,
    make_person,
    sentences,
)
from awareness_vllm.anchors.words import FIT, Words, words_of
from awareness_vllm.errors import BadInput

MEASURE = Words(
    first=words_of(
        """
        Maya Melissa Mara Michael Miguel Mila Mohammed Mona Monica Nadia Naomi Natalie Nathan
        Neil Nicholas Nicole Nigel Nina Noah Nora Olga Oliver Olivia Omar Oscar Otto Owen Pablo
        Pamela Patricia Patrick Paula Pedro Peter Petra Philip Priya Quentin Rachel Rafael Ralph
        Ramona Raymond Rebecca Regina Richard Rita Robert Rosa Rowan Ruben Rupert Ruth Samuel
        Sandra Sarah Sebastian Selma Silvia Simon Sofia Stella Stephen Susan Sven Tamara Teresa
        Theodore Thomas Tobias Ursula Valerie Vera Victor Viola Walter Wendy William Yasmin
        Yusuf Zoe
        """
    ),
    last=words_of(
        """
        Macdonald Mackenzie Maldonado Marsh Marshall Mason Maxwell Mccarthy Medina Mendez Meyer
        Miller Mitchell Moore Morales Moreno Morgan Morris Morrison Mueller Murphy Murray
        Nakamura Navarro Nelson Newman Nguyen Nielsen Nolan Novak Okafor Oliveira Olsen Ortega
        Osborne Palmer Parker Patel Pearson Pereira Perkins Peterson Phillips Popov Porter
        Powell Quinn Ramirez Ramsey Reed Reeves Reyes Reynolds Richter Riley Rivera Roberts
        Robinson Rossi Russell Sanders Santos Sato Schmidt Schneider Scott Shaw Silva Simmons
        Singh Sinclair Steiner Stewart Stone Sullivan Suzuki Tanaka Taylor Thompson Torres
        Tucker Turner Vargas Vaughan Wagner Walsh Watson Weber Whitaker Wong Wright Yamada Young
        Zimmerman
        """
    ),
    cities=words_of(
        """
        Oakland Odessa Omaha Orlando Osaka Oslo Ottawa Oxford Palermo Paris Perth Philadelphia
        Phoenix Pisa Pittsburgh Plymouth Portland Porto Poznan Prague Preston Pretoria Quebec
        Quito Rabat Reykjavik Richmond Riga Rochester Rome Rotterdam Sacramento Salzburg
        Santiago Sarajevo Seattle Seoul Seville Shanghai Sheffield Singapore Southampton
        Stockholm Strasbourg Stuttgart Swansea Sydney Taipei Tallinn Tampa Tbilisi Tehran Tokyo
        Toledo Toronto Toulouse Trieste Tripoli Tucson Tunis Turin Uppsala Utrecht Valencia
        Vancouver Venice Verona Vienna Vilnius Warsaw Washington Wellington Winnipeg Wuhan York
        Zagreb Zurich Lisbon
        """
    ),
    jobs=words_of(
        """
        librarian locksmith machinist magician manager mathematician mechanic merchant
        meteorologist midwife miner musician navigator notary novelist nurse optician painter
        paramedic pharmacist philosopher photographer physicist pianist pilot plasterer plumber
        poet potter printer professor programmer psychologist publisher receptionist reporter
        roofer sailor salesman sculptor secretary shepherd singer soldier statistician surgeon
        surveyor tailor teacher translator undertaker veterinarian violinist waiter watchmaker
        weaver welder zoologist
        """
    ),
)

CASE_CHARACTERS = 900


KINDS = ("city", "job", "code")


THING = """
{who} bought a {colour} {thing} for {price} dollars.|{who} owns a {colour} {thing}.
The {colour} {thing} in the hall belongs to {who}.
{who} paid {price} dollars for the {thing}, which is {colour}.
The {thing} that {who} lost was {colour}.
For the birthday on {date}, {who} received a {colour} {thing}.
{who} sold the old {thing} and kept the {colour} one, worth {price} dollars.
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


def _text(rng: random.Random, characters: int) -> str:
    parts = [rng.choice(sentences(OPENING))]
    while sum(map(len, parts)) + len(parts) < characters:
        write = rng.choices((_paragraph, _list, _record), (6, 1, 1))[0]
        parts.append(write(rng))
    return "\n\n".join(parts)


def _paragraph(rng: random.Random) -> str:
    """Prose about one person, or about two whose facts are interleaved."""
    people = [make_person(rng, FIT, for_case=False) for _ in range(rng.choice((1, 1, 2)))]
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
    people = [make_person(rng, FIT, for_case=False) for _ in range(rng.randrange(3, 7))]
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
    person = make_person(rng, FIT, for_case=False) | make_details(rng)
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
