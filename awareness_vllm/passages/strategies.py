"""The strategies by which a question ranks a memory's passages.

A scorer gives each of P passages a score [P] for a question's words, 0 for no match; a hop adds to
the scores what is told from the best ones: facts are spread over sentences, and only one of them
shares words with the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from awareness_vllm.passages.words import Scores, WordTable

Scorer = Callable[[WordTable, Sequence[str]], Scores]
Hop = Callable[[WordTable, Sequence[str], Scores], Scores]

ALIKE = 0.4
"""The cosine of two words' embeddings above which they count as alike."""
AFTER, BEFORE = 0.6, 0.3
"""The share of a passage's score that the passages after and before it get."""
RARE = 3
"""A word is rare in at most so many passages."""
SHARED = 0.5
"""The share of the best passage's score that one with the same rare words gets."""


def bm25(table: WordTable, question: Sequence[str]) -> Scores:
    """BM25 (bm25s, Lucene's variant) of the question's words."""
    known = [word for word in question if word in table.where]
    if not known or table.bm25 is None:
        return np.zeros(len(table))
    return np.asarray(table.bm25.get_scores(known), np.float64)


def overlap(table: WordTable, question: Sequence[str]) -> Scores:
    """The sum of the rarities of the words that question and passage share."""
    scores = np.zeros(len(table))
    for word in question:
        if word in table.where:
            scores[table.where[word]] += table.idf[word]
    return scores


def embeddings(table: WordTable, question: Sequence[str]) -> Scores:
    """For each of the question's words its most alike in the passage, by embeddings, weighted by
    its rarity. Without embeddings only the same word is alike."""
    scores = overlap(table, question)
    flat, begins = table.incidence
    if not len(flat) or not question:
        return scores
    cosines = table.vectors(question) @ table.vocabulary_vectors.T
    alike = np.maximum(cosines - ALIKE, 0) / (1 - ALIKE)
    best = np.maximum.reduceat(alike[:, flat], begins, axis=1)
    filled = [number for number, passage in enumerate(table.passages) if passage]
    for word, row in zip(question, best, strict=True):
        same = table.where.get(word)
        near = np.zeros(len(table))
        near[filled] = row
        if same is not None:
            near[same] = 0
        scores += table.idf.get(word, table.rarest) * near
    return scores


def neighbours(table: WordTable, question: Sequence[str], scores: Scores) -> Scores:
    """A share of each passage's score for the one after it, and less for the one before."""
    after, before = np.zeros_like(scores), np.zeros_like(scores)
    after[1:], before[:-1] = AFTER * scores[:-1], BEFORE * scores[1:]
    return scores + np.maximum(after, before)


def shared(table: WordTable, question: Sequence[str], scores: Scores) -> Scores:
    """A share of the best passage's score for those that have its rare words, which the question
    does not have."""
    if not scores.any():
        return scores
    best = int(np.argmax(scores))
    asked = set(question)
    rare = [w for w in set(table.passages[best]) - asked if len(table.where[w]) <= RARE]
    linked = overlap(table, rare)
    linked[best] = 0
    top = linked.max()
    return scores + SHARED * scores[best] * linked / top if top else scores


@dataclass(frozen=True)
class Strategy:
    """A scorer and what follows from its scores."""

    score: Scorer
    hops: tuple[Hop, ...] = ()

    def __call__(self, table: WordTable, question: Sequence[str]) -> Scores:
        """The passages' scores [P]."""
        scores = direct = self.score(table, question)
        for hop in self.hops:
            scores = np.maximum(scores, hop(table, question, direct))
        return scores


SCORERS: dict[str, Scorer] = {"bm25": bm25, "overlap": overlap, "embeddings": embeddings}
HOPS: dict[str, tuple[Hop, ...]] = {
    "": (),
    "+neighbours": (neighbours,),
    "+shared": (shared,),
    "+hops": (neighbours, shared),
}
STRATEGIES: dict[str, Strategy] = {
    scorer + hop: Strategy(SCORERS[scorer], HOPS[hop]) for scorer in SCORERS for hop in HOPS
}
"""The registered strategies by name: a scorer, alone or with a second hop."""
DEFAULT = "bm25+hops"
