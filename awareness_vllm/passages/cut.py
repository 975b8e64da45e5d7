"""The cut of a text into passages: sentences, or lines of code and lists, of few tokens each."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from awareness_vllm.errors import BadInput

Positions = npt.NDArray[np.int64]

LIMIT = 32
"""The tokens of a passage at most; more only where a cut would fall inside a character."""

ABBREVIATION = re.compile(
    r"(?:\b(?:[a-z]|mrs?|ms|drs?|prof|st|sr|jr|vs|etc|cf|vol|pp|fig|e\.g|i\.e)|^\s{0,3}\d{1,3})\.$",
    re.IGNORECASE | re.MULTILINE,
)
"""What ends with a period and ends no sentence: initials and the numbers of lists among it."""
SENTENCE_END = re.compile(
    # Marks of scripts that write no blank after them; others need one, and no small letter then.
    r"[。！？｡．؟۔।॥]++[”’」』）)\"']*+"
    # Possessive, and from the first mark of a run: the time is linear in any text.
    r"|(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s++[^a-z])"
    r"|\n(?:[^\S\n]*+\n)*+"
)
CLAUSE_END = re.compile(r"[,;:，；：、–—)\]}](?=\s)|[，；：、]")
WORD_BEGIN = re.compile(r"(?<=\S)(?=\s)")


class TextTokens:
    """A text's target tokens: where they stand in it, and where it may be cut between them.

    Attributes:
        characters: [T + 1, 2]: the character at which a token begins, and the one at which those
            before it end.
        cuttable: [T + 1]: whether the text may be cut before a token: no token before it has bytes
            of the character that follows. Both ends may be.
    """

    def __init__(self, text: str, spans: Positions) -> None:
        try:
            raw = np.frombuffer(text.encode("utf-8"), np.uint8)
        except UnicodeEncodeError as error:
            raise BadInput(
                "the text is not valid Unicode",
                found=str(error),
                expected="text that UTF-8 can encode",
            ) from error
        spans = np.asarray(spans, np.int64).reshape(-1, 2)
        if len(spans) and (spans.min() < 0 or spans.max() > len(raw)):
            raise BadInput(
                "the tokens' spans do not belong to the text",
                found=f"bytes {spans.min()} to {spans.max()}",
                expected=f"byte spans [T, 2] within a text of {len(raw)} bytes",
            )
        starts = np.append((raw & 0xC0) != 0x80, True)
        # The number of characters that begin before each byte.
        self._before = np.concatenate(([0], np.cumsum(starts)))
        self._starts = np.flatnonzero(starts)
        # A token without bytes stands where the one before it ends.
        ends = np.concatenate(([0], np.maximum.accumulate(spans[:, 1])))
        begins = np.where(spans[:, 1] > spans[:, 0], spans[:, 0], ends[:-1])
        self._begins = np.minimum.accumulate(np.append(begins, len(raw))[::-1])[::-1]
        self.cuttable = (self._begins >= ends) & starts[self._begins] & starts[ends]
        self.cuttable[[0, -1]] = True
        self.characters = np.stack(
            (self._before[np.minimum(self._begins + 1, len(raw))] - 1, self._before[ends]), axis=1
        )
        self.characters[self._begins == len(raw), 0] = len(text)

    def __len__(self) -> int:
        return len(self.cuttable) - 1

    def tokens_at(self, characters: Positions) -> Positions:
        """For each character the first token that begins at it or after it."""
        return np.searchsorted(self._begins, self._starts[characters])

    def next_cut(self, token: int) -> int:
        """The first place at a token or after it where the text may be cut."""
        return token + int(np.argmax(self.cuttable[token:]))

    def previous_cut(self, token: int) -> int:
        """The last place at a token or before it where the text may be cut."""
        return token - int(np.argmax(self.cuttable[token::-1]))


def cut(text: str, tokens: TextTokens, limit: int = LIMIT) -> Positions:
    """The passages' bounds [P + 1] among the tokens: passage p is bounds[p] … bounds[p + 1] - 1.

    Sentences and lines; those of more than `limit` tokens after clauses, else between words, else
    where characters end.
    """
    if not len(tokens):
        return np.zeros(1, np.int64)
    ends = tokens.tokens_at(sentence_ends(text))
    clauses = tokens.tokens_at(np.array([m.end() for m in CLAUSE_END.finditer(text)], np.int64))
    words = tokens.tokens_at(np.array([m.end() for m in WORD_BEGIN.finditer(text)], np.int64))
    ranks = np.where(tokens.cuttable, 1, 0)
    for rank, places in ((2, words), (3, clauses)):
        ranks[places[tokens.cuttable[places]]] = rank
    bounds = [0]
    for end in np.unique(np.append(ends[tokens.cuttable[ends]], len(tokens))).tolist():
        while end - bounds[-1] > limit:
            bounds.append(_cut_within(tokens, ranks, bounds[-1], end, limit))
        if end > bounds[-1]:
            bounds.append(end)
    return np.array(bounds, np.int64)


def sentence_ends(text: str) -> Positions:
    """The characters after which a sentence or a line ends."""
    ends = [
        match.end()
        for match in SENTENCE_END.finditer(text)
        if not (match[0] == "." and ABBREVIATION.search(text, max(0, match.end() - 6), match.end()))
    ]
    return np.array(ends, np.int64)


def _cut_within(tokens: TextTokens, ranks: Positions, begin: int, end: int, limit: int) -> int:
    """Where to end a passage that begins at `begin`, the best place near an equal share."""
    pieces = -(-(end - begin) // limit)
    share = -(-(end - begin) // pieces)
    places = np.arange(begin + max(1, share // 2), begin + limit + 1)
    best = ranks[places].max()
    if not best:
        # A character of many tokens: before it, or after one that has more than a passage.
        before = tokens.previous_cut(begin + limit)
        return before if before > begin else tokens.next_cut(begin + limit)
    places = places[ranks[places] == best]
    return int(places[np.argmin(abs(places - begin - share))])
