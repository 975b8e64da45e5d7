"""Quotes: the passages that a question points at, once more between a memory and the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

QUESTION_MARKS = "?？؟"
ASKED = 500
"""The last characters of a prompt, in which a question mark makes it a question."""


@dataclass(frozen=True)
class Quoting:
    """How many tokens of each memory a question has quoted at most: where it is `automatic`, only
    one with a question mark; with `instead`, nothing is re-read then."""

    budget: int = 0
    automatic: bool = False
    instead: bool = False


NO_QUOTES = Quoting()


def is_question(prompt: str) -> bool:
    """Whether a prompt asks something."""
    return any(mark in prompt[-ASKED:] for mark in QUESTION_MARKS)


def quote(passages: Sequence[str]) -> str:
    """The text that quotes passages, "" without any.

    The word before them tells them from the memory's own end: bare lines were answered exactly 0.62
    of the time, these 0.73 (docs/fidelity-log.md). One line, whatever the passages hold: none of
    them may look like the question.
    """
    texts = [text for passage in passages if (text := " ".join(passage.split()))]
    return f"\n\nContext: {' '.join(texts)}\n" if texts else ""
