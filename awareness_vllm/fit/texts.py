"""Which texts are read, judged on and calibrated with: pieces of the anchors' documents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from awareness_vllm.anchors.corpus import Document, windows
from awareness_vllm.anchors.recall import recall_texts

WINDOW_CHARACTERS = 2400
CONTEXT_CHARACTERS = 1100
CONTINUATION_CHARACTERS = 400
LONG = 4
"""So many times as long are the windows of every other long document, and the contexts cut from
them: a map learned on short texts alone loses on long ones."""


def shuffled_windows(documents: Sequence[Document], seed: int) -> list[str]:
    texts = [
        text
        for number, document in enumerate(documents)
        for text in windows(document, window_characters(document, number))
    ]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def window_characters(document: Document, number: int) -> int:
    """How long the windows of the document of that number are."""
    return WINDOW_CHARACTERS * (LONG if number % 2 and is_long(document.text) else 1)


def is_long(text: str) -> bool:
    """Whether there is room for a long context and what follows it."""
    return len(text) > LONG * CONTEXT_CHARACTERS + CONTINUATION_CHARACTERS


def calibration_texts(
    documents: Sequence[Document], count: int, seed: int
) -> list[tuple[str, str]]:
    """Pairs of context and continuation: stretches of documents and recall texts, by turns."""
    cuts = (pair for text in shuffled_windows(documents, seed + 1) if (pair := _cut(text)))
    pairs: list[tuple[str, str]] = []
    for prose, recall in zip(cuts, recall_texts(count // 2, seed), strict=False):
        pairs += prose, recall
    return [*pairs, *islice(cuts, count - len(pairs))]


def _cut(text: str) -> tuple[str, str] | None:
    """A context and what follows it, cut between words; None where there is no such place."""
    characters = CONTEXT_CHARACTERS * (LONG if is_long(text) else 1)
    middle = text.rfind(" ", 0, characters)
    end = text.rfind(" ", 0, characters + CONTINUATION_CHARACTERS)
    enough = middle > characters // 2 and end > middle + CONTINUATION_CHARACTERS // 2
    return (text[:middle], text[middle:end]) if enough else None
