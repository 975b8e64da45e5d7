"""The words of passages and questions: what a question and a passage can share."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property

import bm25s
import numpy as np
import numpy.typing as npt

logging.getLogger("bm25s").setLevel(logging.WARNING)

Scores = npt.NDArray[np.float64]
WordVectors = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""A lookup of vectors [W, E] for W words, say the target's token embeddings."""

UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts that write no blanks between words: their words are pairs of characters."""
WORD = re.compile(rf"(?=([{UNSPACED}]{{2}}))|[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+")
QUESTION_MARKERS = "q question answer please tell give name"
FUNCTION_WORDS = frozenset(
    f"""
    {QUESTION_MARKERS} a about all also am an and any are as at be been but by can could did do doe
    does doing done during each every for from had has have having he her here hers him his how i if
    in into is it its itself just like many me more most much my no nor not of off on or other our
    out over own same she should so some such than that the their them then there these they this
    those through to too under until up us very was we were what when where which while who whom
    whose why will with would you your
    """.split()
)


def located_words(text: str) -> list[tuple[str, int]]:
    """The words of a text, small and without a plural's s, each with the character it begins at.

    Where no blanks are written, its characters and pairs of characters.
    """
    return [(m[1] or _stem(m[0].casefold()), m.start()) for m in WORD.finditer(text)]


def words(text: str) -> list[str]:
    """The words of a text that say what it is about, as often as they are there."""
    return [word for word, _ in located_words(text) if word not in FUNCTION_WORDS]


def _stem(word: str) -> str:
    """The word without a plural's s (Harman's S stemmer): "lives" is "live"."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


class WordTable:
    """The words of P passages, and how rare each is among them.

    Attributes:
        passages: The words of each passage, as often as they are there.
        idf: A word's rarity, log(1 + P / passages that have it); of words not there as of one.
    """

    def __init__(self, texts: Sequence[str], vectors: WordVectors | None = None) -> None:
        self.passages = [words(text) for text in texts]
        self._vectors = vectors
        frequencies = Counter(word for passage in self.passages for word in set(passage))
        self.idf = {word: math.log(1 + len(texts) / n) for word, n in frequencies.items()}
        self.rarest = math.log(1 + len(texts))
        where: dict[str, list[int]] = {word: [] for word in frequencies}
        for number, passage in enumerate(self.passages):
            for word in set(passage):
                where[word].append(number)
        self.where = {word: np.array(numbers) for word, numbers in where.items()}

    def __len__(self) -> int:
        return len(self.passages)

    @cached_property
    def bm25(self) -> bm25s.BM25 | None:
        """The BM25 index; None where no passage has a word."""
        if not self.where:
            return None
        index = bm25s.BM25()
        index.index(self.passages, show_progress=False)
        return index

    @cached_property
    def vocabulary(self) -> list[str]:
        """The memory's words, [W]."""
        return list(self.where)

    def vectors(self, of: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors [W, E] of words; without a lookup, no words are alike: [W, 0]."""
        if self._vectors is None:
            return np.zeros((len(of), 0), np.float32)
        vectors = np.asarray(self._vectors(of), np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)

    @cached_property
    def vocabulary_vectors(self) -> npt.NDArray[np.float32]:
        """The unit vectors [W, E] of the memory's words."""
        return self.vectors(self.vocabulary)

    @cached_property
    def incidence(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The word numbers of all passages one after another, [N], and where each passage that has
        words begins among them; passages without words have none."""
        number = {word: i for i, word in enumerate(self.vocabulary)}
        flat = [number[word] for passage in self.passages for word in passage]
        sizes = np.array([len(passage) for passage in self.passages])
        begins = np.concatenate(([0], np.cumsum(sizes)[:-1])) if len(sizes) else sizes
        return np.array(flat, np.int64), begins[sizes > 0]
