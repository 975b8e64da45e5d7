"""Quotes: what a question points at stands once more between the memories and the question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from passage_stubs import ARCHIVE, LANTERN, SENTENCES, TEXT, memory, prompt, span_of

from awareness_vllm.passages.quotes import Quoting, is_question, quote
from awareness_vllm.serving.api.report import headers_of
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.wmatrix.registry import Registry

pytestmark = pytest.mark.unit

AUTOMATIC = Quoting(10, automatic=True, instead=True)
ASKED = Quoting(10)


def encode(text: str) -> list[int]:
    return list(text.encode())


def quoted(given: Prompt, question: str) -> str:
    """The text that a prompt quotes for a question."""
    return bytes(given.with_quotes([question], encode).quote_ids).decode()


def test_a_question_has_its_passage_quoted_and_nothing_re_read() -> None:
    used = prompt(quoting=AUTOMATIC).with_quotes([LANTERN], encode)
    assert bytes(used.quote_ids).decode() == f"\n\nContext: {SENTENCES[1].strip()}\n"
    report = used.report()
    (((begin, end),),) = report["quoted"]["characters"]
    assert TEXT[begin:end].strip() == SENTENCES[1].strip()
    assert report["quoted"]["tokens"] == len(used.quote_ids)
    assert headers_of(report)["Quoted"] == str(len(used.quote_ids))
    assert "reread" not in report
    assert not used.passage_requests(LANTERN)
    assert used.params == prompt(budget=0).params  # quotes are plain tokens after what is loaded


def test_a_prompt_that_asks_nothing_has_passages_re_read() -> None:
    plain = LANTERN.replace("?", "")
    used = prompt(quoting=AUTOMATIC).with_quotes([plain], encode)
    assert [request.span for request in used.passage_requests(plain)] == [span_of(1)]
    assert "quoted" not in used.report()
    assert quoted(prompt(quoting=ASKED), plain)  # it was told to


def test_both_where_both_are_asked_for() -> None:
    used = prompt(quoting=ASKED).with_quotes([LANTERN], encode)
    assert used.quotes == (tuple(r.span for r in used.passage_requests(LANTERN)),)


def test_each_memory_gives_its_own_and_an_edition_what_is_asked_for() -> None:
    given = prompt(memory("a"), memory("b"), quoting=replace(AUTOMATIC, budget=24))
    both = f"{LANTERN} {ARCHIVE}"
    assert quoted(given, both).count(SENTENCES[1].strip()) == 2
    assert quoted(replace(given, editions=(True, False)), both).count(SENTENCES[1].strip()) == 1
    exact = replace(given, editions=(True, True))
    assert not quoted(exact, both)
    assert quoted(replace(exact, quoting=replace(ASKED, budget=24)), both).count("lantern") == 2


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda: prompt(memory(exact=True), quoting=ASKED), id="a copy"),
        pytest.param(lambda: prompt(memory(tokens=False), quoting=ASKED), id="no text"),
        pytest.param(lambda: prompt(quoting=Quoting(0, automatic=True)), id="off"),
        pytest.param(lambda: prompt(quoting=ASKED).recomputed(), id="read natively"),
    ],
)
def test_nothing_is_quoted_where_nothing_is_to_gain(given: Callable[[], Prompt]) -> None:
    asked = given()
    assert asked.with_quotes([LANTERN], encode) is asked


@pytest.fixture
def resolver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryResolver:
    """That of a server that quotes up to 16 tokens; its one memory is the stubs'."""
    geometry = SimpleNamespace(additive=False)
    model: Any = SimpleNamespace(folder=folder, max_model_len=1000, geometry=geometry)
    resolver = MemoryResolver(model, {}, Registry(), 4, quote=16)
    monkeypatch.setattr(resolver, "resolve_one", lambda *_: memory())
    return resolver


def test_quotes_refuse_nothing_that_fits_without_them(resolver: MemoryResolver) -> None:
    one = resolver.resolve(MemoryRequest(ids=("mem_a",)), "")
    quoted = resolver.quoted(one, [LANTERN], 1)
    assert quoted.quote_ids
    assert resolver.append_question(quoted, [7]) == [*one.ids, *quoted.quote_ids, 7]
    room = 1000 - len(one.ids)
    rest = room - len(quoted.quote_ids)
    assert resolver.quoted(one, [LANTERN], 5, rest - 5).quote_ids == quoted.quote_ids
    assert resolver.quoted(one, [LANTERN], 5, rest - 4) is one
    assert resolver.quoted(one, [LANTERN], 5, room - 5) is one
    # An answer that does not fit without quotes either is cut short.
    assert resolver.quoted(one, [LANTERN], 5, room - 4).quote_ids == quoted.quote_ids
    assert resolver.quoted(one, [LANTERN], rest) is one


def test_one_question_among_several_prompts_is_enough(resolver: MemoryResolver) -> None:
    one = resolver.resolve(MemoryRequest(ids=("mem_a",)), "")
    plain = "The lantern is " + "green and " * 60
    assert resolver.quoted(one, [LANTERN, plain], 1).quote_ids
    assert resolver.quoted(one, [plain, LANTERN], 1).quote_ids
    assert not resolver.quoted(one, [plain, plain], 1).quote_ids


def test_what_is_read_natively_for_its_quality_keeps_what_was_said_of_quotes(
    resolver: MemoryResolver,
) -> None:
    """An edition may load it after all."""
    asked = MemoryRequest(ids=("mem_a",), quality_target=0.5, quote=16)
    natively = resolver.resolve(asked, "")
    assert not natively.loads
    assert not resolver.quoted(natively, [LANTERN], 1).quote_ids
    assert resolver.quoted(natively.with_editions([True]), [LANTERN], 1).quote_ids


def test_what_a_request_says_of_quotes_counts(resolver: MemoryResolver) -> None:
    def quoting(**fields: Any) -> Quoting:
        return resolver.resolve(MemoryRequest(ids=("mem_a",), **fields), "").quoting

    assert quoting() == Quoting(16, automatic=True, instead=True)
    assert quoting(quote=8) == Quoting(8, automatic=False, instead=True)
    assert quoting(quote=0).budget == 0
    assert not quoting(reread=8).instead
    # What is re-read may be what reaches the target.
    assert not quoting(quality_target=0.5, on_low_quality="use").instead


@given(st.lists(st.text()))
def test_quotes_hold_every_passage_that_is_not_blank(passages: list[str]) -> None:
    text = quote(passages)
    assert bool(text) == any(passage.strip() for passage in passages)
    assert all(" ".join(passage.split()) in text for passage in passages)
    assert text == "" or (text[:2], text[-1]) == ("\n\n", "\n")
    assert text.count("\n") in (0, 3)  # no passage looks like a line of the question's


@given(st.text())
def test_what_asks_has_a_question_mark_near_its_end(text: str) -> None:
    assert all(is_question(f"{text}{mark}{'x' * 499}") for mark in "?？؟")
    assert not is_question(text.replace("?", "").replace("？", "").replace("؟", ""))
    assert not is_question("?" + "x" * 500)
