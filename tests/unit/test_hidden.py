"""Long lessons hide facts in prose, say where they are, and share nothing with measured cases."""

from __future__ import annotations

import random
import re

import pytest
from awareness_demo import facts, needle_templates
from awareness_demo.facts import MEASURE

from awareness_vllm.anchors import hidden
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.anchors.facts import is_case_code, sentences
from awareness_vllm.anchors.hidden import KINDS, Needle, hidden_facts, hide
from awareness_vllm.fit.texts import LESSON_CHARACTERS, LongLessons

pytestmark = pytest.mark.unit

PROSE = "It was late. Nothing stirred in the harbour; the tide had turned!\n\nWas that all? " * 60
DOCUMENTS = [Document(f"{folder}/{n}.txt", PROSE) for folder in "abc" for n in range(3)]
LESSONS = LongLessons.of([*DOCUMENTS, Document("facts/1.txt", "Zebra. " * 900)], 0)


def drawn(kind: int, count: int = 60) -> list[tuple[str, str, list[list[tuple[int, int]]]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden, "KINDS", (KINDS[kind],))
        return [hidden_facts(random.Random(n), PROSE[:3000]) for n in range(count)]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_what_a_line_restates_stands_in_its_sentences(kind: int) -> None:
    for text, continuation, about in drawn(kind):
        assert continuation.startswith("\n")
        assert "{" not in continuation.replace("{}", "")
        assert all(about)
        told = " ".join(text[begin:end] for ranges in about for begin, end in ranges)
        named = set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", continuation))
        assert not {name for name in named if name in text} - {
            name for name in named if name in told
        }
        for number in re.findall(r"\b\d{4}\b", continuation):
            assert number in told


def test_needles_leave_the_prose_as_it_is() -> None:
    text, ranges = hide(random.Random(1), PROSE, [Needle(("A fact.", "More.")), Needle(("B.",))])
    assert [[text[b:e] for b, e in own] for own in ranges] == [["A fact.", "More."], ["B."]]
    for begin, end in sorted((r for own in ranges for r in own), reverse=True):
        text = text[:begin] + text[end:]
    assert text.split() == PROSE.split()


def test_facts_stand_anywhere() -> None:
    depths = [about[0][0][0] / len(text) for text, _, about in drawn(0, 200)]
    assert min(depths) < 0.05
    assert max(depths) > 0.95


def test_nothing_of_the_measured_cases_is_used() -> None:
    texts = [a + b for kind in range(len(KINDS)) for a, b, _ in drawn(kind)]
    words = {word.lower() for text in texts for word in re.findall(r"\w+", text)}
    n = needle_templates
    measured = {word.lower() for field in MEASURE for word in field}
    assert not words & (measured | {*n.THINGS, *n.ITEMS, *n.ROOMS, *n.RELATIONS})
    assert not words & {w for pair in n.SYNONYMS.items() for p in pair for w in p.split()} - {
        "and", "s", "baby", "bed",
    }  # fmt: skip
    codes = {int(code) for text in texts for code in re.findall(r"\b\d{4}\b", text)}
    assert not {code for code in codes if is_case_code(code) and not 1951 <= code < 2025}
    blocks = [*n.PARAPHRASED.values(), *n.BACKWARDS.values(), *n.SPREAD.values()]
    cases = [s for block in blocks for part in block for s in sentences(part) if "{" in s]
    cases += sentences(n.ARRIVALS) + sentences(n.PRICED) + list(facts.QUESTIONS.values())
    templates = [
        template
        for block in (*hidden.ASKS.values(), *hidden.SECOND.values(), *hidden.FURTHER.values(),
                      hidden.PLACE, hidden.PRICE, hidden.FIRST, hidden.LINK)
        for template in sentences(block)
    ]  # fmt: skip
    assert not {t.lower() for t in templates} & {c.strip().lower() for c in cases}
    for phrase in ("Question:", "Answer:", "lives in", "works as", "The code of", "is at home in"):
        assert not any(phrase in text for text in texts), phrase


def test_lessons_have_all_lengths_and_are_distinct() -> None:
    lessons = [LESSONS(number) for number in range(600)]
    assert len({lesson.context for lesson in lessons}) == 600
    lengths = [len(lesson.context) for lesson in lessons]
    low, high = LESSON_CHARACTERS
    assert low * 0.4 < min(lengths) < low * 1.5
    assert high * 0.8 < max(lengths) < high * 1.2
    reread = [lesson for lesson in lessons if lesson.reread]
    assert 0.25 < len(reread) / 600 < 0.42
    assert all(0 <= b < e for lesson in reread for b, e in lesson.reread)
    assert not any("Zebra" in lesson.context for lesson in lessons)
    assert LESSONS(7) == LongLessons.of(DOCUMENTS, 0)(7) != LongLessons.of(DOCUMENTS, 1)(7)


def test_short_documents_give_lessons_too() -> None:
    lessons = LongLessons.of([Document("a", "one two three four. " * 12)], 0)
    assert all(lessons(n).context and lessons(n).continuation for n in range(60))
