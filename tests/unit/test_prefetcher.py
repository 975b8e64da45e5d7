"""Prefetches of a worker: polls report, steps align, and what nobody waits for ends. What tenants
have loaded stays warm for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
from loader_stubs import ALIGNED, SECONDS, StubAlignment, loader_of, part

from awareness_vllm.errors import MemoryNotFound, PackageCorrupt, PackageTooLarge
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.serving.connector import prefetcher as module
from awareness_vllm.serving.connector.capture_queue import PENDING
from awareness_vllm.serving.connector.loader import MemoryLoader
from awareness_vllm.serving.connector.prefetcher import MAX_TICKETS, TOO_MANY, Prefetcher
from awareness_vllm.serving.params import LoadParams

pytestmark = pytest.mark.unit


@pytest.fixture
def loader(folder: Path, geometry: Geometry, tmp_path: Path) -> MemoryLoader:
    return loader_of(folder, geometry, tmp_path)


@pytest.fixture
def stub(loader: MemoryLoader, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubAlignment]:
    stub = StubAlignment(loader, monkeypatch)
    yield stub
    stub.go_on.set()


@pytest.fixture
def prefetcher(loader: MemoryLoader, stub: StubAlignment) -> Prefetcher:
    """An idle engine's, whose files are read."""
    stub.go_on.set()
    return Prefetcher(loader)


def plan(*names: str, tenant: str = "") -> LoadParams:
    return LoadParams(parts=tuple(part(name) for name in names or ("mem",)), tenant=tenant)


def read(prefetcher: Prefetcher) -> None:
    """Wait until all requested files are read."""
    wait([alignment.source for alignment in prefetcher.loader.pending.values()], SECONDS)


def test_a_poll_of_an_idle_engine_aligns_one_block(
    prefetcher: Prefetcher, stub: StubAlignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awareness_vllm.serving.connector.loader.STEP_BUDGET_S", 0.0)
    monkeypatch.setattr(MemoryLoader.advance, "__defaults__", (0.0,))
    stub.needed = 2
    for name in ("a", "b", "c"):
        assert prefetcher.begin(name, plan(name), False) == PENDING
    read(prefetcher)
    for polls in range(1, 7):
        aligned, answers = prefetcher.poll(["a", "b", "c"])
        assert aligned
        assert len(stub.blocks) == polls
    assert answers[-1] == "cold"
    assert prefetcher.tickets == {}
    assert prefetcher.poll([]) == (False, [])


def test_a_poll_between_the_steps_of_a_busy_engine_only_reports(
    prefetcher: Prefetcher, stub: StubAlignment
) -> None:
    prefetcher.begin("a", plan(), False)
    read(prefetcher)
    prefetcher.stepped = time.perf_counter() + SECONDS  # as if a step had just ended
    for _ in range(3):
        assert prefetcher.poll(["a"]) == (False, [PENDING])
    assert stub.blocks == []
    prefetcher.loader.advance()
    assert prefetcher.poll(["a"]) == (False, ["cold"])


def test_pinned_memories_stay_warm(prefetcher: Prefetcher, loader: MemoryLoader) -> None:
    loader.warm.limit = 0
    assert prefetcher.begin("a", plan(), True) == PENDING
    read(prefetcher)
    assert prefetcher.poll(["a"])[1] == ["cold"]
    assert prefetcher.begin("b", plan(), False) == "warm"
    loader.warm.put(("large", ""), ALIGNED)
    assert loader.warm.get(("mem", "map")) is ALIGNED


def test_an_error_is_the_tickets_answer(prefetcher: Prefetcher, stub: StubAlignment) -> None:
    stub.error = PackageCorrupt("no such bytes")
    prefetcher.begin("a", plan("bad"), False)
    read(prefetcher)
    stub.error = RuntimeError()
    prefetcher.begin("b", plan("worse"), False)
    read(prefetcher)
    assert prefetcher.poll(["a", "b"])[1] == ["no such bytes.", "RuntimeError"]
    assert "given up" in prefetcher.poll(["a"])[1][0]


def test_tickets_are_given_up_and_bounded(
    prefetcher: Prefetcher, loader: MemoryLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the front end, whose client has gone, or without it, when it is gone itself."""
    prefetcher.begin("a", plan("x", "y"), False)
    prefetcher.begin("b", plan("x"), False)
    read(prefetcher)
    prefetcher.cancel(["a", "unknown"])
    assert [alignment.part.memory for alignment in loader.pending.values()] == ["x"]
    monkeypatch.setattr(module, "LIFETIME_S", -SECONDS)
    prefetcher.poll([])
    assert (prefetcher.tickets, loader.pending, loader.reads.bytes) == ({}, {}, 0)
    monkeypatch.undo()
    monkeypatch.setattr(loader, "source_bytes", lambda part, tenant: 1)
    monkeypatch.setattr(loader, "read_source", lambda part, tenant: time.sleep(SECONDS))
    prefetcher.tickets = dict.fromkeys(map(str, range(MAX_TICKETS)), module.Ticket([], SECONDS**9))
    assert prefetcher.begin("c", plan(), False) == TOO_MANY


# Bytes, and whose memories they are


def test_six_prefetches_hold_no_more_bytes_than_they_may(
    loader: MemoryLoader, stub: StubAlignment
) -> None:
    prefetcher = Prefetcher(loader)
    loader.reads.max_bytes, stub.bytes = 100, 40
    for name in "abcdef":
        prefetcher.begin(name, plan(name), False)
    stub.go_on.set()
    most, end = 0, time.monotonic() + SECONDS
    while prefetcher.tickets:
        assert time.monotonic() < end
        most = max(most, loader.reads.bytes)
        prefetcher.poll(list(prefetcher.tickets))
    assert most == 80
    assert sorted(stub.blocks) == list("abcdef")
    assert loader.reads.bytes == 0


def test_a_package_that_is_too_large_is_refused_unread(
    loader: MemoryLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "read_source", lambda *args: pytest.fail("it was read"))
    large, missing = (f"mem_{digit * 32}" for digit in "01")
    (tmp_path / f"{large}.safetensors").write_bytes(b"x" * 11)
    loader.reads.max_bytes = 10
    for memory, error in ((large, PackageTooLarge), (missing, MemoryNotFound)):
        alignment = loader.request(part(memory), "")
        loader.advance()
        with pytest.raises(error):
            alignment.result.result(0)
    assert loader.pending == {}


def warm(prefetcher: Prefetcher, *tenants: str) -> MemoryLoader:
    """A loader whose memory these tenants have loaded, one after another."""
    for tenant in tenants:
        if prefetcher.begin(tenant, plan(tenant=tenant), False) == PENDING:
            read(prefetcher)
            assert prefetcher.poll([tenant])[1] == ["cold"]
    return prefetcher.loader


def test_a_tenant_drops_its_own_use_of_a_memory_alone(prefetcher: Prefetcher) -> None:
    loader = warm(prefetcher, "acme", "umbrella")
    assert not loader.evict("mem", "acme")
    assert not loader.evict("mem", "stranger")
    assert loader.loaded(["mem", "other"]) == ["mem"]
    assert loader.evict("mem", "umbrella")
    assert not loader.evict("mem", "umbrella")
    assert loader.loaded(["mem"]) == []
    # What was dropped and is aligned anew is the one's who asks for it.
    warm(prefetcher, "umbrella")
    assert loader.evict("mem", "umbrella")


def test_whoever_waits_for_an_alignment_has_its_memory(prefetcher: Prefetcher) -> None:
    for tenant in ("acme", "umbrella"):
        prefetcher.begin(tenant, plan(tenant=tenant), False)
    assert not prefetcher.loader.evict("mem", "acme")
    read(prefetcher)
    prefetcher.poll([])
    assert not prefetcher.loader.evict("mem", "acme")
    assert prefetcher.loader.evict("mem", "umbrella")


def test_a_pinned_memory_is_nobodys_to_drop(prefetcher: Prefetcher) -> None:
    prefetcher.begin("a", plan(tenant="acme"), True)
    read(prefetcher)
    prefetcher.poll(["a"])
    assert not prefetcher.loader.evict("mem", "acme")
    assert prefetcher.loader.warm.get(("mem", "map")) is ALIGNED
