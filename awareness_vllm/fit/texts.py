"""Pieces of the anchors' documents for the fit: windows, and pairs for the calibration."""

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
"""Factor of the windows of every other long document, and of the contexts split from them: a map
learned on short texts alone is worse on long ones."""


def shuffled_windows(documents: Sequence[Document], seed: int) -> list[str]:
    """The windows of all documents, in an order by the seed."""
    texts = [
        text
        for number, document in enumerate(documents)
        for text in windows(document, window_characters(document, number))
    ]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def window_characters(document: Document, number: int) -> int:
    """The characters of a window of the document with that number."""
    return WINDOW_CHARACTERS * (LONG if number % 2 and is_long(document.text) else 1)


def is_long(text: str) -> bool:
    """Whether a text has room for a long context and its continuation."""
    return len(text) > LONG * CONTEXT_CHARACTERS + CONTINUATION_CHARACTERS


def calibration_texts(
    documents: Sequence[Document], count: int, seed: int
) -> list[tuple[str, str]]:
    """Pairs of context and continuation: prose of documents and recall texts, alternating."""
    prose_pairs = (
        pair for text in shuffled_windows(documents, seed + 1) if (pair := split_context(text))
    )
    pairs: list[tuple[str, str]] = []
    for prose, recall in zip(prose_pairs, recall_texts(count // 2, seed), strict=False):
        pairs += prose, recall
    return [*pairs, *islice(prose_pairs, count - len(pairs))]


def split_context(text: str) -> tuple[str, str] | None:
    """A context and its continuation, split between words; None where the text is too short."""
    characters = CONTEXT_CHARACTERS * (LONG if is_long(text) else 1)
    middle = text.rfind(" ", 0, characters)
    end = text.rfind(" ", 0, characters + CONTINUATION_CHARACTERS)
    long_enough = middle > characters // 2 and end > middle + CONTINUATION_CHARACTERS // 2
    return (text[:middle], text[middle:end]) if long_enough else None
