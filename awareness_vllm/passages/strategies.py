"""The strategies by which a question ranks a memory's passages.

A scorer gives each of P passages a score [P] for a question's words, 0 for no match; a hop adds
what follows from the best scores: facts are spread over sentences, and only one of them shares
words with the question. The shares were chosen on one half of the cases of
`benchmarks/passages.py`, where most of them hardly matter (docs/fidelity-log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from awareness_vllm.passages.words import Scores, Start, WordTable

Scorer = Callable[[WordTable, Sequence[str]], Scores]
Hop = Callable[[WordTable, Sequence[str], Scores], Scores]

FLOOR = 0.4
"""The share of the best score below which no passage is chosen: every needless one costs recall."""
ALIKE = 0.2
"""The cosine of two words' embeddings above which they count as alike."""
SYNONYM = 0.3
"""What the likest word counts, as a share of the same word."""
NEXT, BACK_REFERENCE, BACK_REFERENCE_BY_TWO, ITEM = 0.3, 0.6, 0.5, 0.9
"""The shares of a passage's score for the one after it: any, which is chosen only if it has a score
of its own as well; one that begins with a pronoun, which may refer to the one before that, too; an
item of its list."""
RARE = 3
"""A word is rare in at most so many passages."""
SHARED = 0.5
"""The share of the best passage's score that the one with most of its rare words gets."""


def bm25(table: WordTable, question: Sequence[str]) -> Scores:
    """BM25 of the question's words."""
    return _sum(table, question, table.bm25)


def overlap(table: WordTable, question: Sequence[str]) -> Scores:
    """The sum of the rarities of the words that question and passage share."""
    return _sum(table, question, table.idf)


def _sum(
    table: WordTable, question: Sequence[str], weights: Mapping[str, float | Scores]
) -> Scores:
    scores = np.zeros(len(table))
    for word in question:
        if word in table.where:
            scores[table.where[word]] += weights[word]
    return scores


def embeddings(table: WordTable, question: Sequence[str]) -> Scores:
    """BM25; and for each of the question's words that the memory does not have, the word of a
    passage whose embedding is likest. Without embeddings BM25 alone."""
    scores = bm25(table, question)
    unknown = [word for word in question if word not in table.where]
    occurrences, begins = table.occurrences
    if not unknown or not len(begins):
        return scores
    alike = np.maximum(table.cosines(unknown) - ALIKE, 0) / (1 - ALIKE)
    likest = np.maximum.reduceat(alike[:, occurrences], begins, axis=1)
    scores[table.filled] += SYNONYM * table.rarest * likest.sum(0)
    return scores


def following(table: WordTable, question: Sequence[str], scores: Scores) -> Scores:
    """A share of each passage's score for the one after it."""
    own, out = scores.tolist(), scores.tolist()
    for i in range(1, len(own)):
        if table.starts[i] is Start.ITEM:
            out[i] = max(own[i], ITEM * out[i - 1])
        elif table.starts[i] is Start.BACK_REFERENCE:
            by_two = own[i - 2] if i > 1 else 0.0
            out[i] += max(BACK_REFERENCE * own[i - 1], BACK_REFERENCE_BY_TWO * by_two)
        else:
            out[i] += NEXT * own[i - 1]
    return np.array(out)


def shared(table: WordTable, question: Sequence[str], scores: Scores) -> Scores:
    """A share of the best passage's score for those that have its rare words, which the question
    does not have."""
    if not scores.any():
        return scores
    best = int(np.argmax(scores))
    others = set(table.passages[best]).difference(question)
    linked = overlap(table, sorted(word for word in others if len(table.where[word]) <= RARE))
    linked[best] = 0
    most = linked.max()
    return scores + SHARED * scores[best] * linked / most if most else scores


@dataclass(frozen=True)
class Strategy:
    """A scorer and what follows from its scores."""

    score: Scorer
    hops: tuple[Hop, ...] = ()

    def __call__(self, table: WordTable, question: Sequence[str]) -> Scores:
        """The passages' scores [P], 0 below the floor."""
        scores = direct = self.score(table, question)
        for hop in self.hops:
            scores = np.maximum(scores, hop(table, question, direct))
        return np.where(scores >= FLOOR * scores.max(initial=0), scores, 0)


SCORERS: dict[str, Scorer] = {"bm25": bm25, "overlap": overlap, "embeddings": embeddings}
HOPS: dict[str, tuple[Hop, ...]] = {
    "": (),
    "+following": (following,),
    "+shared": (shared,),
    "+hops": (following, shared),
}
STRATEGIES: dict[str, Strategy] = {
    scorer + hop: Strategy(SCORERS[scorer], HOPS[hop]) for scorer in SCORERS for hop in HOPS
}
"""The registered strategies by name: a scorer, alone or with a second hop."""
DEFAULT = "embeddings+hops"
