"""A memory of four sentences, and questions that point at two of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.trust.policy import Signers

SENTENCES = (
    "The old ferry leaves the harbour at seven every morning. ",
    "Marta Lindqvist keeps the green lantern in the cellar. ",
    "Rain is expected along the northern coast until Friday. ",
    "The archive of the lighthouse was moved to Trondheim. ",
)
TEXT = "".join(SENTENCES)
LANTERN, ARCHIVE = "Who keeps the green lantern?", "Where is the lighthouse archive?"


def memory(name: str = "a", *, tokens: bool = True, exact: bool = False) -> ResolvedMemory:
    """A memory of TEXT: two ids of the sink, then one for each word."""
    begins = [0, *(i + 1 for i, c in enumerate(TEXT[:-1]) if c == " ")]
    spans = np.array([*zip(begins, [*begins[1:], len(TEXT)], strict=True)])
    entry: Any = SimpleNamespace(
        digest="map", path=Path("m"), manifest=None, certificate=None, signers=signers
    )
    entry = None if exact else entry
    text = (TEXT, spans) if tokens and not exact else None
    ids = list(range(2 + len(spans)))
    return ResolvedMemory(f"mem_{name}", f"digest-{name}", "own", entry, ids, 2, None, text)


def signers(signed_by: object) -> Any:
    return Signers()


def prompt(*memories: ResolvedMemory, budget: int = 10, tail: int = 4, **fields: Any) -> Prompt:
    return Prompt(memories or (memory(),), tail, "acme", budget=budget, **fields)


def span_of(sentence: int) -> tuple[int, int]:
    counts = [len(one.split()) for one in SENTENCES]
    begin = 2 + sum(counts[:sentence])
    return begin, begin + counts[sentence]
