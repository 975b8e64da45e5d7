"""Pieces of the anchors' documents for the fit: windows, and pairs for the calibration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from awareness_vllm.anchors.corpus import Document, windows
from awareness_vllm.anchors.hidden import hidden_facts
from awareness_vllm.anchors.recall import recall_texts

WINDOW_CHARACTERS = 2400
CONTEXT_CHARACTERS = 1100
CONTINUATION_CHARACTERS = 400
LONG = 4
"""Factor of the windows of every other long document, and of the contexts split from them: a map
learned on short texts alone is worse on long ones."""

LESSON_CHARACTERS = (1200, 8000)
"""Characters of a long lesson's prose: 300 to 2,000 tokens, as many lessons of 300 to 600 as of
1,000 to 2,000."""
PASSAGE_CHARACTERS = 100
REREAD = 1 / 3
"""Characters of a passage of prose that is re-read, and the share of lessons with such."""
FACTS = "facts"
"""The folder of the anchors' generated facts."""


@dataclass(frozen=True)
class Lesson:
    """A context, a continuation that is predicted after it, and the ranges of the context's
    characters that are read natively, as passages that a question points at are."""

    context: str
    continuation: str
    reread: tuple[tuple[int, int], ...] = ()


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


@dataclass(frozen=True)
class LongLessons:
    """Lessons without end over documents: facts hidden in 300 to 2,000 tokens of prose, and every
    third one the continuation of prose as long. In a third of each, passages are re-read: what some
    of the questions point at, or any sentences.

    Args:
        prose: the documents' texts, by the folder that they come from.
    """

    prose: dict[str, str]
    seed: int

    @classmethod
    def of(cls, documents: Sequence[Document], seed: int) -> LongLessons:
        """Lessons over documents; generated facts among them are no prose."""
        folders: dict[str, list[str]] = {}
        for document in documents:
            folders.setdefault(document.name.split("/")[0], []).append(document.text)
        some = {name: texts for name, texts in folders.items() if name != FACTS} or folders
        return cls({name: "\n\n".join(texts) for name, texts in some.items()}, seed)

    def __call__(self, number: int) -> Lesson:
        rng = random.Random(f"lesson {self.seed} {number}")
        low, high = LESSON_CHARACTERS
        characters = round(low * (high / low) ** rng.random())
        again = rng.random() < REREAD
        if number % 3 == 2:
            text = self.piece(rng, characters + CONTINUATION_CHARACTERS)
            middle = text.rfind(" ", 0, max(2, len(text) - CONTINUATION_CHARACTERS))
            middle = middle if middle > 0 else len(text) // 2
            context, continuation = text[:middle], text[middle:]
            spots = [rng.randrange(len(context)) for _ in range(rng.randrange(1, 3))] * again
            passages = tuple((spot, spot + PASSAGE_CHARACTERS) for spot in spots)
            return Lesson(context, continuation, passages)
        prose = self.piece(rng, characters)
        context, continuation, about = hidden_facts(rng, prose)
        chosen = rng.sample(about, rng.randrange(1, len(about) + 1)) if again else []
        return Lesson(context, continuation, tuple(sorted({r for ask in chosen for r in ask})))

    def piece(self, rng: random.Random, characters: int) -> str:
        """A piece of about so many characters, cut at blanks; of each folder as often."""
        text = self.prose[rng.choice(sorted(self.prose))]
        begin = rng.randrange(max(1, len(text) - characters))
        begin = text.find(" ", begin, begin + 200) + 1 or begin
        end = text.rfind(" ", begin + characters // 2, begin + characters)
        return text[begin : end if end > 0 else begin + characters].strip()
