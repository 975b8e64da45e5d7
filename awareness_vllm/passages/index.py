"""The index of a memory's passages, and the choice of those that a question points at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from awareness_vllm.errors import BadInput, similar_names
from awareness_vllm.passages import BUDGET
from awareness_vllm.passages.cut import LIMIT, Positions, TextTokens, cut
from awareness_vllm.passages.strategies import DEFAULT, STRATEGIES
from awareness_vllm.passages.words import WordTable, WordVectors, located_words, words

Span = tuple[int, int]
"""Positions begin … end-1 among a memory's ids, the sink's counted."""

MIN = 8
"""The tokens of a chosen span at least: vLLM computes no fewer in a request of its own."""
LONGEST_QUESTION = 8000
"""The characters of a question that count, the last ones: a prompt asks at its end."""


@dataclass(frozen=True)
class PassageIndex:
    """A memory's text, cut into passages and indexed once.

    Attributes:
        bounds: [P + 1]: passage p has the target tokens bounds[p] … bounds[p + 1] - 1 of the text.
        first: The position of the text's first token among the memory's ids: the sink's length.
    """

    text: str
    tokens: TextTokens
    bounds: Positions
    table: WordTable
    first: int

    @classmethod
    def of(
        cls,
        text: str,
        spans: Positions,
        first: int,
        *,
        limit: int = LIMIT,
        vectors: WordVectors | None = None,
    ) -> PassageIndex:
        """The index of a text.

        Args:
            spans: [T, 2] byte spans of the text's target tokens.
            first: The number of ids before the text's, the sink's.
            limit: The tokens of a passage at most.
            vectors: The lookup of words' embeddings; without one, "embeddings" is "bm25".

        Raises:
            BadInput: spans that do not belong to the text, or text that is not Unicode.
        """
        tokens = TextTokens(text, spans)
        bounds = cut(text, tokens, limit)
        begins, ends = tokens.characters[bounds[:-1], 0], tokens.characters[bounds[1:], 1]
        texts = [text[b:e] for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
        return cls(text, tokens, bounds, WordTable(texts, vectors), first)

    def choose(
        self, question: str, budget: int = BUDGET, strategy: str = DEFAULT
    ) -> tuple[Span, ...]:
        """The spans that a question points at, best first up to a budget of tokens.

        Sorted and disjoint, at least `MIN` tokens each, no character split; none where nothing
        matches, and where budget or memory have fewer than `MIN` tokens.

        Raises:
            BadInput: an unknown strategy.
        """
        if strategy not in STRATEGIES:
            raise BadInput(
                "unknown strategy",
                found=strategy,
                expected=", ".join(STRATEGIES),
                remedy=" or ".join(similar_names(strategy, STRATEGIES)) or None,
            )
        asked = [*dict.fromkeys(words(question[-LONGEST_QUESTION:]))]
        if not asked or min(budget, len(self.tokens)) < MIN:
            return ()
        scores = STRATEGIES[strategy](self.table, asked)
        chosen = np.zeros(len(self.tokens) + 2, np.int8)
        left = budget
        # Of equal scores the earlier passage first.
        for passage in np.argsort(-scores, kind="stable").tolist():
            if scores[passage] <= 0 or left <= 0:
                break
            begin, end = self._grown(int(self.bounds[passage]), int(self.bounds[passage + 1]))
            if left == budget and end - begin > left:
                begin, end = self._trimmed(begin, end, left, set(asked))
            new = end - begin - int(chosen[begin + 1 : end + 1].sum())
            if new <= left:
                chosen[begin + 1 : end + 1] = 1
                left -= new
        edges = np.flatnonzero(np.diff(chosen)) + self.first
        return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def characters(self, span: Span) -> tuple[int, int]:
        """The character range of a span in the text; the sink has none of it."""
        begin, end = (max(0, min(p - self.first, len(self.tokens))) for p in span)
        starts, ends = self.tokens.characters[:, 0], self.tokens.characters[:, 1]
        return int(starts[begin]), max(int(starts[begin]), int(ends[end]))

    def _grown(self, begin: int, end: int) -> Span:
        """A passage, with as much after it (at the text's end before it) as it lacks tokens."""
        if end - begin < MIN:
            end = self.tokens.next_cut(min(begin + MIN, len(self.tokens)))
        if end - begin < MIN:
            begin = self.tokens.previous_cut(end - MIN)
        return begin, end

    def _trimmed(self, begin: int, end: int, budget: int, asked: set[str]) -> Span:
        """The part of a passage around the words asked for; the whole where no part will do."""
        start, stop = self.tokens.characters[begin, 0], self.tokens.characters[end, 1]
        found = located_words(self.text[start:stop])
        hits = self.tokens.tokens_at(np.array([at + start for w, at in found if w in asked], int))
        middle = (hits[0] + hits[-1]) // 2 if len(hits) else begin
        first = self.tokens.next_cut(max(begin, min(int(middle) - budget // 2, end - budget)))
        last = self.tokens.previous_cut(min(first + budget, end))
        return (first, last) if last - first >= MIN else (begin, end)
