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
PROSE_PER_RECALL = 2


def shuffled_windows(documents: Sequence[Document], seed: int) -> list[str]:
    texts = [text for document in documents for text in windows(document, WINDOW_CHARACTERS)]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def calibration_texts(
    documents: Sequence[Document], count: int, seed: int
) -> list[tuple[str, str]]:
    """Pairs of context and continuation: stretches of documents, recall texts between them."""
    cuts = (pair for text in shuffled_windows(documents, seed + 1) if (pair := _cut(text)))
    recall = iter(recall_texts(count // (PROSE_PER_RECALL + 1), seed))
    pairs: list[tuple[str, str]] = []
    for pair in islice(cuts, count - count // (PROSE_PER_RECALL + 1)):
        pairs.append(pair)
        if len(pairs) % (PROSE_PER_RECALL + 1) == PROSE_PER_RECALL:
            pairs += islice(recall, 1)
    return [*pairs, *recall][:count]


def _cut(text: str) -> tuple[str, str] | None:
    """A context and what follows it, cut between words; None where there is no such place."""
    middle = text.rfind(" ", 0, CONTEXT_CHARACTERS)
    end = text.rfind(" ", 0, CONTEXT_CHARACTERS + CONTINUATION_CHARACTERS)
    enough = middle > CONTEXT_CHARACTERS // 2 and end > middle + CONTINUATION_CHARACTERS // 2
    return (text[:middle], text[middle:end]) if enough else None
