"""The kinds of mutations: each is a function, registered with the level that it works on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rng = random.Random
DOCUMENT, PARTS, HEADER, BYTES = "document", "parts", "header", "bytes"
ANY, PACKAGE, WMATRIX = "any", "package", "wmatrix"
MAY, SERVER, CONTENT, ALWAYS = "anybody", "no server", "no reader of content", "no reader"
"""Who may serve what a kind makes, provided that it is finite and its own. To refuse it, a server
may need a tokenizer or a map, a reader of content the whole file, and any reader the header."""


@dataclass(frozen=True)
class Kind:
    """A kind of mutation. Its function changes a Container (document, parts), or takes the header's
    JSON (header) or the whole file (bytes) and returns it as bytes; None where it does not apply.
    """

    name: str
    level: str
    files: str
    refuse: str
    apply: Callable[[Rng, Any], Any]


KINDS: list[Kind] = []


def kind(
    level: str, files: str = ANY, refuse: str = MAY
) -> Callable[[Callable[[Rng, Any], Any]], Callable[[Rng, Any], Any]]:
    """Register a mutation under its function's name."""

    def register(function: Callable[[Rng, Any], Any]) -> Callable[[Rng, Any], Any]:
        KINDS.append(Kind(function.__name__, level, files, refuse, function))
        return function

    return register
