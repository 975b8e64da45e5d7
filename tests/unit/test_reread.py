"""The front end's passages: each is read once, whoever asks, and nobody waits for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from passage_stubs import ARCHIVE, LANTERN, SENTENCES, TEXT, memory, prompt, span_of

from awareness_vllm.serving.api import passages as passages_module
from awareness_vllm.serving.api.chat_template import last_words
from awareness_vllm.serving.api.passages import LATE, Passages
from awareness_vllm.serving.api.report import headers_of
from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.connector.metrics import RECOMPUTED
from awareness_vllm.serving.params import LoadParams
from awareness_vllm.serving.prompt import Prompt

pytestmark = pytest.mark.unit


class Engine:
    """Stands for vLLM's EngineClient: a request ends once `gate` is open, with `report` on its
    load."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.report: dict[str, Any] | None = {"temperature": "warm"}
        self.error: Exception | None = None
        self.plans: list[LoadParams] = []
        self.ids: list[list[int]] = []
        self.aborted = 0

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        given = params.extra_args["kv_transfer_params"]
        plan = LoadParams.of(given, prompt["cache_salt"])
        assert plan is not None
        assert params.max_tokens == 1
        self.plans.append(plan)
        self.ids.append(prompt["prompt_token_ids"])
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        if self.error is not None:
            raise self.error
        yield SimpleNamespace(kv_transfer_params=self.report and {PARAMS_KEY: self.report})


def run(ask: Callable[[Engine, Passages], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        engine: Any = Engine()
        await ask(engine, Passages(engine, **options))

    asyncio.run(main())


def test_a_questions_passage_is_read_after_what_comes_before_it_and_laid_over() -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        asked = prompt()
        used = await passages.ensure(asked, LANTERN)
        assert used.rereads == ((span_of(1),),)
        (plan,) = engine.plans
        begin, end = span_of(1)
        assert plan.passage_name == (("digest-a", "map"), (begin, end))
        assert (plan.tenant, engine.ids) == ("acme", [list(range(end))])
        assert used.params is not None
        assert asked.params is not None
        assert used.params.parts[0].rereads == (span_of(1),)
        assert used.params.cache_salt != asked.params.cache_salt
        report = used.report()["reread"]
        (((first, last),),) = report["characters"]
        assert TEXT[first:last] == SENTENCES[1]
        assert report["tokens"] == end - begin
        assert headers_of(used.report())["Reread"] == str(end - begin)

    run(ask)


def test_a_passage_is_read_once_whoever_asks() -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        engine.gate.clear()
        both = asyncio.gather(*(passages.ensure(prompt(), LANTERN) for _ in range(3)))
        await asyncio.sleep(0.05)
        engine.gate.set()
        answers = await both
        other = await passages.ensure(prompt(), ARCHIVE)
        again = await passages.ensure(prompt(), LANTERN)
        # What others asked changes nothing.
        assert {one.rereads for one in (*answers, again)} == {((span_of(1),),)}
        assert {one.params for one in answers} == {again.params}
        assert other.rereads == ((span_of(3)[0], span_of(3)[1]),) or other.rereads
        assert len(engine.plans) == 2

    run(ask)


def test_passages_of_one_question_are_read_at_once() -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        engine.gate.clear()
        asked = asyncio.create_task(passages.ensure(prompt(memory("a"), memory("b")), LANTERN))
        await asyncio.sleep(0.05)
        assert {plan.parts[0].memory for plan in engine.plans} == {"mem_a", "mem_b"}
        engine.gate.set()
        assert (await asked).rereads == ((span_of(1),), (span_of(1),))

    run(ask)


def test_a_question_has_no_more_passages_read_at_once_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passages_module, "MAX_READING", 1)

    async def ask(engine: Engine, passages: Passages) -> None:
        engine.gate.clear()
        asked = asyncio.create_task(passages.ensure(prompt(memory("a"), memory("b")), LANTERN))
        await asyncio.sleep(0.05)
        assert len(engine.plans) == 1
        engine.gate.set()
        assert (await asked).rereads == ((span_of(1),), (span_of(1),))

    run(ask)


def test_a_late_passage_stays_aligned_and_is_there_for_the_next_question() -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        engine.gate.clear()
        late = await passages.ensure(prompt(), LANTERN)
        assert late.rereads == ((),)
        assert late.params == prompt().params
        assert late.report()["reread"] == {"tokens": 0, "characters": [[]], "reason": LATE}
        assert engine.aborted == 0
        engine.gate.set()
        await asyncio.sleep(0)
        assert (await passages.ensure(prompt(), LANTERN)).rereads == ((span_of(1),),)
        assert len(engine.plans) == 1

    run(ask, timeout=0.02)


@pytest.mark.parametrize("how", ["load", "engine"])
def test_a_passage_that_fails_stays_aligned_and_is_tried_again(how: str) -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        if how == "load":
            engine.report = {"temperature": RECOMPUTED, "reason": "MemoryNotFound"}
        else:
            engine.error = RuntimeError("asleep")
        failed = await passages.ensure(prompt(), LANTERN)
        assert failed.rereads == ((),)
        reason = failed.report()["reread"]["reason"]
        assert reason == ("MemoryNotFound" if how == "load" else "RuntimeError")
        engine.report, engine.error = None, None
        assert (await passages.ensure(prompt(), LANTERN)).rereads == ((span_of(1),),)

    run(ask)


def test_a_question_that_is_given_up_ends_what_nobody_else_waits_for() -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        engine.gate.clear()
        one, other = (asyncio.create_task(passages.ensure(prompt(), LANTERN)) for _ in range(2))
        await asyncio.sleep(0.05)
        one.cancel()
        await asyncio.sleep(0.01)
        assert engine.aborted == 0
        other.cancel()
        await asyncio.sleep(0.01)
        assert engine.aborted == 1
        engine.gate.set()
        assert (await passages.ensure(prompt(), LANTERN)).rereads == ((span_of(1),),)

    run(ask)


def test_evicted_passages_are_read_again_and_the_oldest_are_not_counted_on() -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        await passages.ensure(prompt(), LANTERN)
        passages.forget("mem_b")
        passages.forget("mem_digest-a")
        await passages.ensure(prompt(), LANTERN)
        assert len(engine.plans) == 2
        await passages.ensure(prompt(), ARCHIVE)
        assert len(passages.readings) == 1
        await passages.ensure(prompt(), LANTERN)
        assert len(engine.plans) == 4

    run(ask, limit=12)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(prompt(budget=0), id="off"),
        pytest.param(prompt().recomputed(), id="read natively"),
        pytest.param(prompt(memory(exact=True), tail=0), id="a copy"),
        pytest.param(prompt(tail=100), id="all of it in the tail"),
        pytest.param(prompt(memory(tokens=False)), id="a map without tokens"),
    ],
)
def test_what_has_no_passages_to_read_is_left_as_it_is(asked: Prompt) -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        used = await passages.ensure(asked, LANTERN)
        assert used == asked
        assert engine.plans == []
        report = used.report().get("reread")
        if asked.budget and asked.loads:
            no_text = asked.memories[0].wmatrix is not None and asked.memories[0].text is None
            assert ("without the memory's tokens" in report.get("reason", "")) == no_text
        else:
            assert report is None

    run(ask)


def test_passages_of_the_native_tail_are_not_read_twice() -> None:
    last = prompt(tail=len(SENTENCES[3].split()))
    assert last.passages(ARCHIVE) == [()]
    assert prompt(tail=0).passages(ARCHIVE) == [(span_of(3),)]


def test_a_server_that_cannot_read_its_cache_back_says_so() -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        passages.disabled = "a quantised cache"
        used = await passages.ensure(prompt(), LANTERN)
        assert used.report()["reread"]["reason"] == "a quantised cache"
        assert engine.plans == []

    run(ask)


@pytest.mark.parametrize(
    "question", ["", "?!", "¿Dónde está?", "где", "\0", "lantern " * 3000, "日本語の質問"]
)
def test_any_question_is_answered(question: str) -> None:
    async def ask(engine: Engine, passages: Passages) -> None:
        used = await passages.ensure(prompt(), question)
        assert used.report()["reread"]["tokens"] in (0, *range(8, 12))

    run(ask)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "a"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "c"}], "c"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"text": "y"}]}], "x y"),
        ([{"role": "user", "content": None}], ""),
        ([{"role": "system", "content": "a"}, "b"], ""),
    ],
)
def test_a_chat_asks_with_its_last_users_words(messages: list[Any], words: str) -> None:
    assert last_words(messages) == words
