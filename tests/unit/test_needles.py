"""Facts hidden in prose: one answer each, at a known place, of words that no fit has seen."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from awareness_demo.facts import MEASURE, fact_texts
from awareness_demo.needle_templates import FEMALE, ITEMS, MALE, ROOMS, SYNONYMS, THINGS
from awareness_demo.needles import CHARACTERS, KINDS, LENGTHS, PER_CELL, Needle, needles

from awareness_vllm.anchors.facts import COLOURS
from awareness_vllm.anchors.facts import THINGS as FITTED_THINGS
from awareness_vllm.anchors.recall import recall_texts
from awareness_vllm.anchors.words import FIT
from awareness_vllm.errors import BadInput

pytestmark = pytest.mark.unit

PROSE = {
    source: [
        # Some answers stand in the prose as well: no case may ask for them.
        f"Text {n} of {source} tells little.\nNobody in Oslo could say when the wall was built. "
        "A potter kept soap in the attic! What was left is a harp.\n\n" * 90
        for n in range(3)
    ]
    for source in CHARACTERS
}


@pytest.fixture(scope="module")
def cases() -> list[Needle]:
    return needles(PROSE, 0)


def test_every_kind_has_enough_cases_of_every_length(cases: list[Needle]) -> None:
    cells = Counter((case["kind"], case["tokens"]) for case in cases)
    assert cells == {(kind, tokens): PER_CELL for kind in KINDS for tokens in LENGTHS}
    assert PER_CELL >= 12
    assert len(cases) >= 200


def test_even_and_odd_cases_are_two_samples_of_the_same_cells(cases: list[Needle]) -> None:
    even, odd = ([(c["kind"], c["tokens"]) for c in cases[half::2]] for half in (0, 1))
    assert even == odd


def test_the_answer_stands_in_the_named_sentences_alone(cases: list[Needle]) -> None:
    for case in cases:
        context, answer = case["context"], case["answer"]
        assert answer.startswith(" ")
        assert len(answer) <= 60
        needed = " ".join(context[begin:end] for begin, end in case["sentences"])
        rest = context
        for begin, end in sorted(case["sentences"], reverse=True):
            rest = rest[:begin] + rest[end:]
        words = [w for w in re.findall(r"\w+", answer) if w in needed]
        told = [w for w in words if w not in re.findall(r"\w+", case["question"])]
        # A sum's numbers are so small that they stand anywhere.
        if case["kind"] != "sum":
            assert told, case
            assert not any(re.search(rf"\b{word}\b", rest) for word in told), case


def test_contexts_have_the_length_asked_for_and_facts_at_any_depth(cases: list[Needle]) -> None:
    depths = []
    for case in cases:
        size = len(case["context"])
        low, high = (case["tokens"] * factor for factor in (3.9, 4.8))
        assert low * 0.8 <= size <= high * 1.2 + 150
        depths.append(case["sentences"][0][0] / size)
    assert min(depths) < 0.05
    assert max(depths) > 0.9
    assert 0.4 < sum(depths) / len(depths) < 0.6


def test_kinds_are_what_they_are_called(cases: list[Needle]) -> None:
    for case in cases:
        parts = [case["context"][begin:end] for begin, end in case["sentences"]]
        name = re.search(r"[A-Z]\w+ [A-Z]\w+", case["question"].removeprefix("\nQuestion: "))
        if case["kind"] == "spread":
            assert name is not None
            assert name[0] in parts[0]
            assert not set(name[0].split()) & set(parts[1].split())
        if case["kind"] == "backwards":
            assert case["answer"].strip() not in case["question"]
        if case["kind"] in ("several", "two-hop", "sum", "spread"):
            assert len(parts) == 2
        if case["kind"] == "paraphrased" and "dollars" in parts[0]:
            thing = next(word for word in SYNONYMS if word in parts[0])
            assert thing not in case["question"]
            assert SYNONYMS[thing] in case["question"]


def test_no_needle_has_a_word_of_the_fit() -> None:
    assert set(FEMALE + MALE) <= set(MEASURE.first)
    assert not set(FEMALE) & set(MALE)
    ours = {*THINGS, *ITEMS, *ROOMS}
    assert not ours & {*FITTED_THINGS, *COLOURS, *FIT.jobs}
    texts = fact_texts(300, 0) + [f"{a} {b}" for a, b in recall_texts(300, 0)]
    fitted = {word.lower() for text in texts for word in re.findall(r"\w+", text)}
    assert not fitted & ours
    assert not fitted & {*SYNONYMS, *SYNONYMS.values()}


def test_the_seed_decides() -> None:
    assert needles(PROSE, 1, 2) == needles(PROSE, 1, 4)[: len(KINDS) * len(LENGTHS) * 2]
    assert needles(PROSE, 1, 2) != needles(PROSE, 2, 2)


def test_missing_prose_is_refused() -> None:
    with pytest.raises(BadInput, match="wordnet"):
        needles({**PROSE, "wordnet": []}, 0)
