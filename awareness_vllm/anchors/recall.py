"""Calibration texts whose continuation must copy specifics from the context.

Ordinary prose hardly rewards recall: what comes next can mostly be guessed. Here the continuation
restates, or asks for, facts that only the context gives, in other words than the context's.
"""

from __future__ import annotations

import random

from awareness_vllm.anchors.facts import CITY, CODE, FILLER, JOB, sentences, tell, unlike_people
from awareness_vllm.anchors.words import FIT

ASKED = """
Q: Where is {name} at home? A: {city}|Q: Who is {name}? A: {a_job} from {city}
Q: Which number belongs to {name}? A: {code}|Q: What does {name} do? A: {name} is {a_job}.
Home of {name}: {city}|Occupation of {name}: {job}|Number of {name}: {code}
{name} ({job}), {city}, {code}|The number of {name} was {code}.|{name} comes from {city}.
Q: Who has the number {code}? A: {name}|Q: Who is the {job}? A: {name}
"""


def recall_texts(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs of a context about three people and a continuation that repeats its facts."""
    return [_pair(random.Random(f"recall {seed} {i}")) for i in range(count)]


def _pair(rng: random.Random) -> tuple[str, str]:
    people = unlike_people(rng, FIT, for_case=False)
    told = [
        (person, rng.choice(sentences(block))) for person in people for block in (CITY, JOB, CODE)
    ]
    fillers = [(None, line) for line in rng.sample(sentences(FILLER), rng.randrange(4, 9))]
    lines = [*told, *fillers]
    if rng.random() < 0.5:
        rng.shuffle(lines)
    asked = [
        line.format(**rng.choice(people))
        for line in rng.sample(sentences(ASKED), rng.randrange(4, 7))
    ]
    return tell(rng, lines), "\n" + "\n".join(asked)
