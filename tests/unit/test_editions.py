"""A front end has the model read used memories, chunk by chunk, between its users' requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from edition_stubs import (
    DIGEST,
    IDS,
    KEY,
    MAP,
    MEMORY,
    Engine,
    editions_of,
    memory,
    prompt_of,
    settle,
    states_at,
)
from loader_stubs import loader_of

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.api import editions as module
from awareness_vllm.serving.api.editions import Editions, edition_bytes
from awareness_vllm.serving.connector.worker_extension import DROP_EDITION
from awareness_vllm.serving.params import edition_name
from awareness_vllm.serving.prompt import Prompt

pytestmark = pytest.mark.unit


@pytest.fixture
def loader(tiny_models: tuple[Path, Path], geometry: Geometry, tmp_path: Path) -> Any:
    return loader_of(tiny_models[1], geometry, tmp_path)


@pytest.fixture
def engine(loader: Any) -> Engine:
    return Engine(loader)


# From a use to the edition


def test_a_used_memory_is_read_to_its_end_and_used_from_then_on(
    engine: Engine, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_S", 0.0)

    async def run() -> tuple[Prompt, Prompt]:
        editions = editions_of(engine)
        first = await editions.use(prompt_of())
        await settle(editions)
        assert editions.has(MEMORY)
        return first, await editions.use(prompt_of())

    first, second = asyncio.run(run())
    assert (first.editions, first.params and first.params.parts[0].wmatrix) == ((), "")
    assert [(begin, end) for begin, end, _ in engine.requests] == [
        (0, 8),
        (8, 16),
        (16, 30),
    ]
    assert len({salt for _, _, salt in engine.requests}) == 1
    assert engine.plans == [None] * 3
    assert second.params is not None
    assert (second.params.tail, second.params.parts[0].key) == (0, KEY)
    assert second.params.cache_salt != (first.params and first.params.cache_salt)
    kept = loader.editions.get(KEY)
    assert (kept.ids, kept.keys[0].shape) == (IDS, (30, 1, 2))
    assert torch.equal(kept.keys[0], states_at(IDS, 0)[tensor_name(0, "key")])
    # The first token that may be computed is the 23rd, which sees the 8 before it: from 14 on, in
    # the block that begins at 12.
    assert torch.equal(kept.values[1], states_at(IDS, 0)[tensor_name(1, "value")][12:])
    assert engine.drafts.take_counts() == {"made": 1, "bytes": kept.bytes}
    assert engine.drafts.take_counts() == {}
    assert not engine.drafts.drafts


def test_it_is_made_after_so_many_uses_and_never_by_default(engine: Engine) -> None:
    async def uses(count: int, off: str = "", **options: Any) -> int:
        editions = editions_of(engine, **options)
        editions.engine_client.passages.disabled = off
        for _ in range(count):
            await editions.use(prompt_of())
        return len(editions.wanted)

    assert asyncio.run(uses(2, uses=3)) == 0
    assert asyncio.run(uses(3, uses=3)) == 1
    assert asyncio.run(uses(3, policy="never")) == 0
    assert asyncio.run(uses(3, off="an fp8 cache")) == 0
    assert Editions(cast(Any, None)).policy == "never"


def test_what_is_exact_already_needs_none(engine: Engine) -> None:
    own = memory(origin="own")
    assert prompt_of(own, tail=0).edition_key(0) is None
    assert prompt_of(own, tail=0, head=(7, 8)).edition_key(0) == (DIGEST, edition_name((7, 8)))
    assert prompt_of(memory(origin="own", wmatrix=MAP)).edition_key(0) == KEY


def test_one_that_is_larger_than_all_may_be_is_not_made(engine: Engine, geometry: Geometry) -> None:
    async def run(limit: int) -> int:
        editions = editions_of(engine, geometry=geometry, limit=limit)
        await editions.use(prompt_of())
        return len(editions.wanted)

    size = edition_bytes(geometry, len(IDS))
    assert (asyncio.run(run(size)), asyncio.run(run(size - 1))) == (1, 0)


# Users come first


def test_a_request_waits_for_one_chunk_at_most(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_S", 0.01)

    async def run() -> tuple[int, int]:
        editions = editions_of(engine)
        came = asyncio.Event()

        async def in_the_second_chunk() -> None:
            if len(engine.requests) == 2:
                came.set()
                await asyncio.sleep(0)

        engine.during = in_the_second_chunk
        with editions.activity.request():
            await editions.use(prompt_of())
            await asyncio.sleep(0.05)
            assert not engine.requests
        await came.wait()
        with editions.activity.request():
            await asyncio.sleep(0.05)
            during = len(engine.requests)
        await settle(editions)
        return during, len(engine.requests)

    assert asyncio.run(run()) == (2, 3)
    # What was read is loaded after a request, which may have taken its blocks.
    assert [plan and plan.tokens for plan in engine.plans] == [None, None, 16]


def test_always_means_beside_requests(engine: Engine) -> None:
    async def run() -> bool:
        editions = editions_of(engine, policy="always")
        with editions.activity.request():
            await editions.use(prompt_of())
            await settle(editions)
        return editions.has(MEMORY)

    assert asyncio.run(run())


def test_without_a_prefix_cache_what_is_read_is_loaded(engine: Engine, loader: Any) -> None:
    async def run() -> None:
        editions = editions_of(engine, cached=False)
        await editions.use(prompt_of())
        await settle(editions)

    asyncio.run(run())
    assert [plan and plan.tokens for plan in engine.plans] == [None, 8, 16]
    assert torch.equal(
        loader.editions.get(KEY).values[1], states_at(IDS, 0)[tensor_name(1, "value")][12:]
    )
    assert not loader.heads


# What goes wrong


def test_what_fails_is_tried_again_from_its_beginning(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def fails_once() -> None:
        if len(engine.requests) == 2:
            raise RuntimeError("the engine is busy")

    engine.during = fails_once

    async def run() -> Prompt:
        editions = editions_of(engine)
        await editions.use(prompt_of())
        await settle(editions)
        return await editions.use(prompt_of())

    assert asyncio.run(run()).editions == (True,)
    assert [begin for begin, _, _ in engine.requests] == [0, 8, 0, 8, 16]
    first, _, again, *_ = (salt for _, _, salt in engine.requests)
    assert first != again
    assert DROP_EDITION in engine.calls
    assert engine.drafts.take_counts()["failed"] == 1


def test_a_server_that_shuts_down_waits_for_no_edition(engine: Engine) -> None:
    """Its engine is gone before the task is cancelled, so the request ends in an error of that."""

    async def run() -> bool:
        editions = editions_of(engine)
        hangs = asyncio.Event()

        async def during() -> None:
            hangs.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise RuntimeError("the engine is dead")

        engine.during = during
        await editions.use(prompt_of())
        await hangs.wait()
        assert editions.worker is not None
        editions.worker.cancel()
        await asyncio.wait([editions.worker], timeout=5)
        return editions.worker.done()

    assert asyncio.run(run())
    assert len(engine.requests) == 1


def test_with_a_dead_engine_nothing_is_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)

    async def dies() -> None:
        engine.errored = True
        raise RuntimeError("the engine is dead")

    engine.during = dies

    async def run() -> None:
        editions = editions_of(engine)
        await editions.use(prompt_of())
        assert editions.worker is not None
        await asyncio.wait([editions.worker], timeout=5)

    asyncio.run(run())
    assert len(engine.requests) == 1


def test_a_lost_draft_is_begun_anew(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)

    async def forgets_once() -> None:
        if len(engine.requests) == 3:
            engine.drafts.drafts.clear()

    engine.during = forgets_once

    async def run() -> bool:
        editions = editions_of(engine)
        await editions.use(prompt_of())
        await settle(editions)
        return editions.has(MEMORY)

    assert asyncio.run(run())
    assert [begin for begin, _, _ in engine.requests] == [0, 8, 16, 0, 8, 16]


def test_workers_that_do_not_answer_are_no_users_business(engine: Engine) -> None:
    async def run() -> Prompt:
        editions = editions_of(engine)
        engine.worker = None  # type: ignore[assignment]
        return await editions.use(prompt_of())

    assert asyncio.run(run()).editions == ()


def test_an_edition_that_is_gone_is_noticed_and_made_again(engine: Engine, loader: Any) -> None:
    async def run() -> list[tuple[bool, ...]]:
        editions = editions_of(engine)
        found = []
        for step in range(3):
            found.append((await editions.use(prompt_of())).editions)
            await settle(editions)
            if step == 1:
                loader.editions.drop(MEMORY)
                editions.lost(prompt_of(editions=(True,)))
        return [*found, (await editions.use(prompt_of())).editions]

    assert asyncio.run(run()) == [(), (True,), (), (True,)]


def test_one_that_is_used_for_long_is_asked_about_again(
    engine: Engine, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASK_AGAIN_S", -1.0)

    async def run() -> tuple[Prompt, Prompt]:
        editions = editions_of(engine)
        await editions.use(prompt_of())
        await settle(editions)
        loader.editions.drop(MEMORY)
        before = await editions.use(prompt_of())
        await asyncio.gather(*editions.checks)
        return before, await editions.use(prompt_of())

    before, after = asyncio.run(run())
    assert (before.editions, after.editions) == ((True,), ())


def test_an_evicted_memory_has_none_until_it_is_used_again(engine: Engine, loader: Any) -> None:
    async def run() -> int:
        editions = editions_of(engine)

        async def evicted() -> None:
            if len(engine.requests) == 3:
                editions.forget(MEMORY)

        engine.during = evicted
        await editions.use(prompt_of())
        worker = editions.worker
        assert worker is not None
        await worker
        assert not editions.has(MEMORY)
        return len(engine.requests)

    assert asyncio.run(run()) == 3
    assert not loader.editions.memories
    assert not engine.drafts.drafts


def test_another_front_ends_edition_is_used(engine: Engine) -> None:
    async def run() -> Prompt:
        one, other = editions_of(engine), editions_of(engine)
        await one.use(prompt_of())
        await settle(one)
        return await other.use(prompt_of(tenant="umbrella"))

    assert asyncio.run(run()).editions == (True,)
    assert len(engine.requests) == 3
