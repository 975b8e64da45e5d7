"""Generated facts: what is measured shares nothing with what is fitted."""

from __future__ import annotations

import re

import pytest
from awareness_demo import facts
from awareness_demo.facts import MEASURE, fact_cases, fact_texts

from awareness_vllm.anchors import facts as templates
from awareness_vllm.anchors.facts import sentences
from awareness_vllm.anchors.words import FIT
from awareness_vllm.errors import BadInput

pytestmark = pytest.mark.unit

FIT_BLOCKS = (
    templates.CITY,
    templates.JOB,
    templates.CODE,
    facts.THING,
    templates.DATE,
    templates.FILLER,
)
CASE_BLOCKS = (facts.CASE_CITY, facts.CASE_JOB, facts.CASE_CODE, facts.CASE_FILLER)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("field", FIT._fields)
def test_word_lists_are_long_enough_and_without_repeats(field: str) -> None:
    fit, measure = getattr(FIT, field), getattr(MEASURE, field)
    assert len(fit) >= (80 if field == "jobs" else 150)
    assert len(measure) >= (40 if field == "jobs" else 60)
    assert len(set(fit)) == len(fit)
    assert len(set(measure)) == len(measure)


def test_no_name_city_or_job_is_in_both_sets() -> None:
    fit = {word.lower() for field in FIT for word in field}
    measure = {word.lower() for field in MEASURE for word in field}
    assert not fit & measure


def test_no_measured_word_is_in_any_fitted_text() -> None:
    fitted = set().union(*map(words, fact_texts(300, 0)))
    assert not fitted & {word.lower() for field in MEASURE for word in field}


def test_no_code_is_in_both() -> None:
    fitted = set().union(*(re.findall(r"\b\d{4}\b", text) for text in fact_texts(300, 0)))
    answers = {case["answer"].strip() for case in fact_cases(300, 0)}
    codes = {answer for answer in answers if answer.isdigit()}
    assert len(codes) > 80
    # Years are four digits too; a case's code must not be told by them either.
    assert not {c for c in codes & fitted if not 1951 <= int(c) < 2025}


def test_no_sentence_is_in_both() -> None:
    fit = {sentence for block in FIT_BLOCKS for sentence in sentences(block)}
    case = {sentence for block in CASE_BLOCKS for sentence in sentences(block)}
    assert not fit & case
    # Nor do fitted sentences use the words in which the questions are to be answered.
    for phrase in ("lives in", "works as", "The code of"):
        assert any(phrase in question for question in facts.QUESTIONS.values())
        assert not any(phrase in sentence for sentence in fit | case)


def test_questions_are_worded_unlike_the_context() -> None:
    for case in fact_cases(60, 0):
        stem = case["question"].rsplit("Answer: ", 1)[1]
        assert stem not in case["context"]


def test_cases_can_be_answered_in_one_way() -> None:
    cases = fact_cases(300, 0)
    assert len(cases) == 300
    for case in cases:
        assert case["answer"].startswith(" ")
        answer = case["answer"].strip()
        assert case["context"].count(answer) == 1
        assert 800 <= len(case["context"]) <= 1000
        assert set(case) == {"context", "question", "answer", "kind"}
        name = re.search(r"(\w+ \w+)(?: live| work|\?)", case["question"])
        assert name is not None
        assert name[1] in case["context"]


def test_kinds_take_turns() -> None:
    jobs, cities = set(MEASURE.jobs), set(MEASURE.cities)
    answers = [case["answer"].strip() for case in fact_cases(9, 3)]
    assert all(answer in cities for answer in answers[0::3])
    assert all(answer in jobs for answer in answers[1::3])
    assert all(answer.isdigit() for answer in answers[2::3])


def test_the_seed_decides() -> None:
    assert fact_texts(3, 1) == fact_texts(5, 1)[:3]
    assert fact_texts(3, 1) != fact_texts(3, 2)
    assert fact_cases(3, 1) == fact_cases(5, 1)[:3]
    assert fact_cases(3, 1) != fact_cases(3, 2)


def test_texts_have_about_the_length_asked_for_and_no_open_fields() -> None:
    for text in fact_texts(50, 0, characters=1500):
        assert 1500 <= len(text) <= 2400
        assert not re.search(r"[{}|]\w+}", text)
    assert fact_texts(0, 0) == []


def test_senseless_counts_are_refused() -> None:
    with pytest.raises(BadInput):
        fact_texts(-1, 0)
    with pytest.raises(BadInput):
        fact_cases(-1, 0)
