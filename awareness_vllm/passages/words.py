"""The words of passages and questions: what a question and a passage can share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cached_property

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
WordVectors = Callable[[Sequence[str]], Vectors]
"""A lookup of embeddings [N, E] of N words."""

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


K1, B = 1.5, 0.75
"""BM25's usual constants: how soon repetition counts no more, how much length counts against."""


def _stem(word: str) -> str:
    """The word without a plural's s (Harman's S stemmer): "lives" is "live"."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


class Start(Enum):
    """How a passage begins: as any other, with a pronoun (English alone), as an item of a list."""

    PLAIN, BACK_REFERENCE, ITEM = range(3)


ITEM_MARK = re.compile(r"\s*(?:[-*•–]|\d{1,3}[.)])\s")
PRONOUN = re.compile(
    r"\W*(?:he|she|it|they|his|her|its|their|this|that|these|those|there|both)\b", re.IGNORECASE
)


def start_of(passage: str) -> Start:
    """How a passage begins."""
    if ITEM_MARK.match(passage):
        return Start.ITEM
    return Start.BACK_REFERENCE if PRONOUN.match(passage) else Start.PLAIN


class WordTable:
    """The words of P passages, and how rare each is among them.

    Attributes:
        passages: The words of each passage, as often as they are there.
        starts: How each passage begins.
        where: The passages that have a word.
        idf: A word's rarity, log(1 + P / passages that have it); the `rarest` is in one.
        bm25: What a word gives each of the passages that have it.
    """

    def __init__(self, texts: Sequence[str], vectors: WordVectors | None = None) -> None:
        self.passages = [words(text) for text in texts]
        self.starts = [start_of(text) for text in texts]
        self._vectors = vectors
        counts = [Counter(passage) for passage in self.passages]
        where: dict[str, list[int]] = {}
        for number, count in enumerate(counts):
            for word in count:
                where.setdefault(word, []).append(number)
        self.where = {word: np.array(numbers) for word, numbers in where.items()}
        self.idf = {word: math.log(1 + len(texts) / len(n)) for word, n in where.items()}
        self.rarest = math.log(1 + len(texts))
        sizes = np.array([len(passage) for passage in self.passages])
        # Lucene's variant of BM25. The PyPI library bm25s gives the same (a test holds that), but
        # imports numba, with which in a process vLLM 0.32's CPU worker does not start.
        norms = K1 * (1 - B + B * sizes / max(sizes.mean(), 1e-9)) if len(sizes) else sizes
        self.bm25 = {}
        for word, numbers in self.where.items():
            often = np.array([counts[number][word] for number in where[word]])
            idf = math.log(1 + (len(texts) - len(often) + 0.5) / (len(often) + 0.5))
            self.bm25[word] = idf * often / (often + norms[numbers])

    def __len__(self) -> int:
        return len(self.passages)

    @cached_property
    def occurrences(self) -> tuple[Numbers, Numbers]:
        """The word numbers of all passages one after another, [N], and where each passage that has
        words begins among them."""
        number = {word: i for i, word in enumerate(self.where)}
        sizes = np.array([len(passage) for passage in self.passages], np.int64)
        begins = np.cumsum(sizes) - sizes
        flat = [number[word] for passage in self.passages for word in passage]
        return np.array(flat, np.int64), begins[sizes > 0]

    @cached_property
    def filled(self) -> Numbers:
        """The passages that have words."""
        return np.flatnonzero([bool(passage) for passage in self.passages])

    @cached_property
    def _embedded(self) -> tuple[Vectors, Vectors]:
        """The memory's words as unit vectors [W, E] about their mean, and the mean [E]: what all
        embeddings have in common says nothing about a word."""
        assert self._vectors is not None
        vectors = np.asarray(self._vectors([*self.where]), np.float32)
        mean = vectors.mean(0)
        return _unit(vectors - mean), mean

    def cosines(self, words: Sequence[str]) -> Vectors:
        """The cosines [N, W] of words to each of the memory's; 0 where there are no embeddings."""
        if self._vectors is None or not self.where:
            return np.zeros((len(words), len(self.where)), np.float32)
        vectors, mean = self._embedded
        return _unit(np.asarray(self._vectors(words), np.float32) - mean) @ vectors.T


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
