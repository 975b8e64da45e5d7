"""Editions: the place in a prompt where each holds, and how a worker puts it together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from connector_stubs import plan_with, request
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

from awareness_vllm.align.kv_writer import KVWriter
from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import MemoryNotFound, QualityUnreachable, UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.connector.metrics import LoadTracker, StepOutcomes
from awareness_vllm.serving.params import EDITION, Key, Part, edition_name
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.tiers import DiskTier

pytestmark = pytest.mark.unit


@pytest.fixture
def loader(tiny_models: tuple[Path, Path], geometry: Geometry, tmp_path: Path) -> Any:
    return loader_of(tiny_models[1], geometry, tmp_path)


@pytest.fixture
def engine(loader: Any) -> Engine:
    return Engine(loader)


# Where it stands


def test_an_edition_holds_only_after_what_it_was_read_after(engine: Engine) -> None:
    """In a chat and after another memory: each is read, and loaded, after the ids before it."""
    other = memory("b" * 64, ids=[2, 50, 51, 52])

    async def run() -> tuple[Prompt, Prompt]:
        editions = editions_of(engine)
        chat = prompt_of(memory(), other, head=(7, 8, 9), tail=3)
        await editions.use(chat)
        await settle(editions)
        return await editions.use(chat), await editions.use(prompt_of())

    chat, alone = asyncio.run(run())
    assert alone.editions == ()
    assert chat.editions == (True, True)
    assert chat.params is not None
    head, first, second = chat.params.parts
    assert (head.tokens, first.skip, first.tokens, second.skip, second.tokens) == (3, 3, 29, 32, 3)
    kept = engine.drafts.loader.editions.get(second.key)
    assert kept is not None
    assert kept.ids[second.skip :] == other.ids[1:]
    assert kept.ids[: second.skip] == [7, 8, 9, *IDS[1:]]


def test_a_report_says_what_is_exact_and_what_is_only_claimed() -> None:
    prompt = prompt_of(memory(), memory("b" * 64, wmatrix=MAP)).with_editions([True, False])
    report = prompt.report()
    assert (report["edition"], report["retention"]) == ([True, False], [1.0, None])
    assert (report["basis"], report["origin"]) == (["own", None], ["claimed", "claimed"])
    assert prompt.tail == 4
    assert prompt.recomputed("no load").report()["basis"] == ["own", "own"]


def test_editions_of_all_memories_reach_every_quality_target() -> None:
    natively = prompt_of(memory(), memory("b" * 64)).recomputed("no plan keeps 0.99")
    assert natively.with_editions([True, False]) == natively
    refused = replace(natively, refusal=QualityUnreachable("no plan keeps 0.99"))
    assert refused.with_editions([True, False]).refusal is not None
    assert refused.with_editions([True, True]).refusal is None
    exact = natively.with_editions([True, True])
    assert (exact.tail, exact.reason, exact.retention) == (0, "", [1.0, 1.0])


# The worker's side


def test_a_draft_takes_chunks_in_order_only(engine: Engine) -> None:
    drafts = engine.drafts

    def extend(begin: int, end: int, name: str = "d") -> str:
        engine.captures.announce("c", "")
        engine.captures.capture("c", lambda: states_at(IDS[:end], begin), begin)
        return drafts.extend(name, "c", begin)

    assert "first chunks are gone" in extend(8, 16)
    assert extend(0, 8) == ""
    assert "does not follow" in extend(16, 24)
    assert "nothing was captured" in drafts.extend("d", "c", 8)
    assert extend(8, 16) == ""
    assert "not read so far" in drafts.finish("d", KEY, IDS, "acme")
    assert "are gone" in drafts.finish("d", KEY, IDS, "acme")
    for i in range(9):
        assert extend(0, 8, f"d{i}") == ""
    assert "d0" not in drafts.drafts
    assert drafts.take_counts() == {"failed": 2, "bytes": 0}


def test_editions_go_with_the_last_tenant_that_used_them(loader: Any) -> None:
    edition = AlignedMemory([1], [torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 2)])
    loader.keep_edition(KEY, edition, "acme")
    loader.holders.add(KEY, ["umbrella"])
    assert not loader.evict(MEMORY, "acme")
    assert loader.has_edition(KEY)
    assert loader.evict(MEMORY, "umbrella")
    assert not loader.has_edition(KEY)


def test_on_disk_they_outlive_the_server(
    loader: Any, tiny_models: tuple[Path, Path], geometry: Geometry, tmp_path: Path
) -> None:
    """With layers of different lengths; for its own model and context only."""
    weights = geometry.weights
    loader.disk = DiskTier(tmp_path / "disk", 2**20, weights, torch.float32)
    states = states_at(IDS, 0)
    first, second = (states[tensor_name(0, part)] for part in ("key", "value"))
    edition = AlignedMemory(IDS, [first, first[12:].clone()], [second, second[12:].clone()])
    loader.keep_edition(KEY, edition, "acme")
    loader.disk.thread.submit(lambda: None).result()
    later = loader_of(tiny_models[1], geometry, tmp_path)
    assert not later.has_edition(KEY)
    later.disk = DiskTier(tmp_path / "disk", 2**20, weights, torch.float32)
    assert later.has_edition(KEY)
    assert not later.has_edition((DIGEST, edition_name([1])))
    source = later.read_source(part_of(KEY), "")
    assert (source.temperature, source.memory.ids) == ("warm", IDS)
    assert [len(key) for key in source.memory.keys] == [30, 18]
    with pytest.raises(MemoryNotFound, match="kept no longer"):
        later.read_source(part_of((DIGEST, edition_name([1]))), "")
    assert later.evict(MEMORY, "acme")
    assert not later.has_edition(KEY)


def part_of(key: Key) -> Part:
    return Part(memory=MEMORY, digest=key[0], wmatrix=key[1], tokens=len(IDS))


def test_the_warm_tier_and_the_editions_have_a_bound_each(loader: Any) -> None:
    loader.editions.limit = 100
    edition = AlignedMemory([1], [torch.zeros(1, 1, 8)], [torch.zeros(1, 1, 8)])
    loader.warm.put((DIGEST, "m"), edition)
    for name in ("a", "b"):
        loader.keep_edition((name * 64, EDITION), edition, "")
    assert [*loader.editions.memories] == [("b" * 64, EDITION)]
    assert (DIGEST, "m") in loader.warm.memories
    alignment = loader.request(part_of(("b" * 64, EDITION)), "acme")
    assert alignment.result.result() == (edition, "warm")


@pytest.mark.parametrize("begin", [0, 10, 14])
def test_of_a_layer_with_its_last_rows_what_has_a_slot_is_written(begin: int) -> None:
    """Rows 12 … 29 of a layer: what lies before them must lie in null blocks."""
    geometry = SimpleNamespace(layers=[SimpleNamespace(positions=None)])
    written: list[Any] = []
    writer = KVWriter({0: None}, {0: 0}, {0: slice(None)}, cast(Any, geometry), torch.float32)
    object.__setattr__(writer, "write", lambda i, key, value, slots: written.append((key, slots)))
    states = states_at(IDS, 0)[tensor_name(0, "key")]
    slots = torch.arange(begin, 30).masked_fill(torch.arange(begin, 30) < 12, -1)
    writer.place([states[12:]], [states[12:]], begin, 0, [slots], length=30)
    ((key, found),) = written
    assert torch.equal(key, states[max(12, begin) :])
    assert found.tolist() == [*range(max(12, begin), 30)]
    if begin < 12:
        with pytest.raises(UnsupportedModel, match="later tokens can see"):
            writer.place([states[12:]], [states[12:]], begin, 0, [slots.abs()], length=30)


def test_what_came_of_editions_is_counted_once_for_all_ranks() -> None:
    made = StepOutcomes(editions={"made": 1, "bytes": 7})
    both = made.aggregate(StepOutcomes(editions={"made": 1, "failed": 1, "bytes": 9}))
    assert both.editions == {"made": 1, "failed": 1, "bytes": 9}
    tracker = LoadTracker()
    tracker.record_editions(both.editions)
    tracker.record_editions({})
    stats = tracker.take_stats()
    assert stats is not None
    assert stats.data["editions"] == [both.editions]
    assert tracker.take_stats() is None


@pytest.mark.parametrize(("wmatrix", "used"), [(EDITION, [{"used": 1}]), ("m", [])])
def test_a_request_that_used_an_edition_is_counted(
    wmatrix: str, used: list[dict[str, int]]
) -> None:
    tracker = LoadTracker()
    plan = plan_with(wmatrix=wmatrix, tokens=20)
    assert tracker.report(request(computed=20), plan)
    assert tracker.stats.data["editions"] == used
