"""Mutants: a seed, one to three kinds of mutation, and how the file gets to its place."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass

import fuzz.documents
import fuzz.parts
import fuzz.raw  # noqa: F401  all three register their kinds
from fuzz.container import Container, assemble, encode
from fuzz.registry import (
    ANY,
    BYTES,
    DOCUMENT,
    HEADER,
    KINDS,
    MAY,
    PACKAGE,
    PARTS,
    WMATRIX,
    Kind,
    Rng,
)

__all__ = ["ENTRY", "Mutant", "mutant"]

ENTRY = "entry"
"""A disk-cache entry: its digest is nobody's to forge, so these are never signed again."""
INT8 = "int8"
"""The seed that is a W-Matrix with its products in int8."""
LEVELS = (DOCUMENT, PARTS, HEADER, BYTES)
OWN_NAME, OTHER_NAME, LINK, PIPE, FOLDER, HOLE, OVERWRITTEN = (
    "under its own ID",
    "under another ID",
    "a link to it",
    "a pipe",
    "a folder",
    "with a hole of a terabyte",
    "written over a good file after its check",
)
PLACES = (OTHER_NAME, LINK, PIPE, FOLDER, HOLE, OVERWRITTEN)
OFTEN = 0.85


@dataclass(frozen=True)
class Mutant:
    """A mutated file: `seed` is the seed's name, `file` what it is, `refuse` who must not serve it,
    `signed` whether its payload digest was computed anew."""

    number: int
    seed: str
    file: str
    kinds: tuple[str, ...]
    signed: bool
    place: str
    refuse: str
    raw: bytes


def mutant(seed: int, number: int, files: dict[str, bytes]) -> Mutant:
    """The mutant of a number, always the same one.

    Args:
        files: the seeds' bytes by name; W-Matrices are named `wmatrix` and `int8`, disk-cache
            entries `entry`, everything else is a package.
    """
    rng = random.Random(f"{seed} {number}")
    while True:
        name = rng.choice(sorted(files))
        file = {WMATRIX: WMATRIX, INT8: WMATRIX, ENTRY: ENTRY}.get(name, PACKAGE)
        usable = [kind for kind in KINDS if kind.files in (ANY, file)]
        if file == ENTRY:
            usable = [kind for kind in usable if kind.level in (PARTS, HEADER, BYTES)]
        count = rng.choices((1, 2, 3), (70, 20, 10))[0]
        chosen = sorted(
            # The first of a seed's mutants go through all kinds.
            [usable[number % len(usable)], *(rng.choice(usable) for _ in range(count - 1))],
            key=lambda kind: LEVELS.index(kind.level),
        )
        signed = file != ENTRY and rng.random() < OFTEN
        place = OWN_NAME if file != PACKAGE or rng.random() < OFTEN else rng.choice(PLACES)
        raw = apply(rng, files[name], chosen, signed)
        if raw is not None and raw not in files.values():
            refuse = chosen[0].refuse if len(chosen) == 1 else MAY
            names = tuple(kind.name for kind in chosen)
            return Mutant(number, name, file, names, signed, place, refuse, raw)


STRANGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""What a mutation raises on a file that another one has taken parts away from."""


def apply(rng: Rng, raw: bytes, kinds: list[Kind], signed: bool) -> bytes | None:
    """A seed after some kinds of mutation, sorted by level; None where one does not apply."""
    try:
        return _apply(rng, raw, kinds, signed)
    except STRANGE:
        if len(kinds) == 1:
            raise
        return None


def _apply(rng: Rng, raw: bytes, kinds: list[Kind], signed: bool) -> bytes | None:
    file = copy.deepcopy(Container.parse(raw))
    early = [kind for kind in kinds if kind.level in (DOCUMENT, PARTS)]
    for kind in early:
        if kind.apply(rng, file) is None:
            return None
    if early:
        if signed:
            file.sign()
        raw = assemble(encode(file.header()), file.data())
    for kind in kinds[len(early) :]:
        if kind.level == HEADER:
            parsed = Container.parse(raw)
            raw = kind.apply(rng, (json.loads(json.dumps(parsed.header())), parsed.data()))
        else:
            raw = kind.apply(rng, raw)
    return raw
