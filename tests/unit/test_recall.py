"""Calibration texts teach recall, and share nothing with the measured cases."""

from __future__ import annotations

import re

import pytest
from awareness_demo import facts
from awareness_demo.facts import MEASURE, fact_cases

from awareness_vllm.anchors.facts import is_case_code, sentences
from awareness_vllm.anchors.recall import PEOPLE_QUESTIONS, recall_texts
from awareness_vllm.anchors.words import FIT

pytestmark = pytest.mark.unit

PAIRS = recall_texts(200, 0)
TEXTS = [context + continuation for context, continuation in PAIRS]


def test_no_measured_name_city_or_job_is_used() -> None:
    words = set().union(*(re.findall(r"\w+", text.lower()) for text in TEXTS))
    assert not words & {word.lower() for field in MEASURE for word in field}
    assert words & {word.lower() for word in FIT.cities}


def test_no_code_of_a_case_is_used() -> None:
    words = {int(code) for text in TEXTS for code in re.findall(r"\b\d{4}\b", text)}
    # Years are four digits too.
    assert not {code for code in words if is_case_code(code) and not 1951 <= code < 2025}
    assert len(words) > 100


def test_the_cases_sentences_and_questions_are_not_used() -> None:
    blocks = (facts.CASE_CITY, facts.CASE_JOB, facts.CASE_CODE, facts.CASE_FILLER)
    cases = [sentence for block in blocks for sentence in sentences(block)]
    assert not {*cases} & {*sentences(PEOPLE_QUESTIONS)}
    # What stands between the fields of a question or of a case's sentence, where it is a phrase.
    templates = [*facts.QUESTIONS.values(), *cases]
    parts = {part.strip() for t in templates for part in re.split(r"{\w+}|\n", t)}
    phrases = {part for part in parts if part.count(" ") >= 1}
    assert {"lives in", "works as", "Answer: The code of"} <= phrases
    for phrase in (*phrases, "Question:", "Answer:"):
        assert not any(phrase in text for text in TEXTS), phrase


def test_no_question_of_a_case_is_asked() -> None:
    for case in fact_cases(30, 0):
        lines = [line for line in case["question"].split("\n") if line]
        assert not any(line in text for line in lines for text in TEXTS)


def test_answers_are_in_the_context() -> None:
    for context, continuation in PAIRS:
        assert continuation.startswith("\n")
        assert "{" not in context + continuation
        for number in re.findall(r"\b\d{4}\b", continuation):
            assert number in context
        cities = {city for city in FIT.cities if re.search(rf"\b{city}\b", continuation)}
        assert all(city in context for city in cities)


def test_the_seed_decides() -> None:
    assert recall_texts(3, 1) == recall_texts(5, 1)[:3]
    assert recall_texts(3, 1) != recall_texts(3, 2)
