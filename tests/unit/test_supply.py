"""Memories on their way: aligned once, block by block, for whoever still wants them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory, realign
from awareness_vllm.errors import PackageCorrupt, UnsupportedModel
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.capture_queue import PENDING
from awareness_vllm.serving.connector.loader import (
    A_MOMENT,
    HEADS,
    Alignment,
    Found,
    MemoryLoader,
    embedding_of,
)
from awareness_vllm.serving.params import LoadParams, Part
from awareness_vllm.serving.tiers import DiskTier, WarmTier
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

ALIGNED = AlignedMemory([1, 2, 3], [torch.zeros(3, 1, 2)], [torch.ones(3, 1, 2)])
SECONDS = 30.0


def part(name: str = "mem", wmatrix: str = "map") -> Part:
    return Part(memory=name, wmatrix=wmatrix, tokens=3)


class Held:
    """Memories whose files are read when they are let go, and that take so many blocks to align."""

    def __init__(self, loader: MemoryLoader) -> None:
        self.go_on = threading.Event()
        self.read: list[str] = []
        self.blocks: list[str] = []
        self.needed = 1
        self.wrong: Exception | None = None
        loader.find = self.find  # type: ignore[method-assign]
        loader.block = self.block  # type: ignore[method-assign]

    def find(self, part: Part, tenant: str) -> tuple[Found, str]:
        self.read.append(part.memory)
        assert self.go_on.wait(SECONDS)
        if self.wrong:
            raise self.wrong
        return Found(), "cold"

    def block(self, alignment: Alignment, found: Found) -> AlignedMemory | None:
        self.blocks.append(alignment.part.memory)
        return ALIGNED if self.blocks.count(alignment.part.memory) >= self.needed else None


@pytest.fixture
def held(loader: MemoryLoader) -> Iterator[Held]:
    held = Held(loader)
    yield held
    held.go_on.set()


@pytest.fixture
def loader(tmp_path: Path) -> MemoryLoader:
    memories: Any = SimpleNamespace(
        stores={"": Store(tmp_path)}, folder=tmp_path, geometry=SimpleNamespace(weights="w")
    )
    return MemoryLoader(ServingConfig(store=str(tmp_path)), memories, torch.bfloat16)


def arrived(loader: MemoryLoader, alignment: Alignment) -> tuple[Any, str]:
    """What an alignment comes to, in as many steps as it takes."""
    wait([alignment.found], SECONDS)
    while not alignment.result.done():
        loader.advance()
    return alignment.result.result()


def test_two_who_ask_for_one_cold_memory_align_it_once(loader: MemoryLoader, held: Held) -> None:
    first, second = loader.ask(part(), ""), loader.ask(part(), "another tenant's")
    assert first is second
    other = loader.ask(part("mem", "another map"), "")
    assert other is not first
    loader.advance()
    assert not first.result.done()
    held.go_on.set()
    for alignment in (first, other):
        assert arrived(loader, alignment) == (ALIGNED, "cold")
    assert arrived(loader, loader.ask(part(), "")) == (ALIGNED, "warm")
    assert (held.read, held.blocks) == (["mem"] * 2, ["mem"] * 2)
    assert loader.under_way == {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a moment."""
    clock = itertools.count()
    monkeypatch.setattr(
        "awareness_vllm.serving.connector.loader.time",
        SimpleNamespace(perf_counter=lambda: next(clock) * A_MOMENT),
    )


@pytest.mark.usefixtures("clock")
def test_a_step_that_others_wait_for_aligns_one_block(loader: MemoryLoader, held: Held) -> None:
    held.go_on.set()
    held.needed = 3
    asked = [loader.ask(part(name), "") for name in ("a", "b")]
    wait([alignment.found for alignment in asked], SECONDS)
    loader.advance()
    assert held.blocks == ["a"]
    loader.advance(2.5 * A_MOMENT)
    assert held.blocks == ["a"] * 3 + ["b"]
    assert [alignment.result.done() for alignment in asked] == [True, False]


@pytest.mark.usefixtures("clock")
def test_an_alignment_ends_when_nobody_wants_it_any_more(loader: MemoryLoader, held: Held) -> None:
    held.needed = 2
    held.go_on.set()
    first = loader.ask(part(), "")
    assert loader.ask(part(), "") is first
    wait([first.found], SECONDS)
    loader.advance()
    loader.leave(first)
    assert list(loader.under_way.values()) == [first]
    loader.leave(first)
    loader.advance()
    assert held.blocks == ["mem"]
    again = loader.ask(part(), "")
    assert again is not first
    loader.leave(first)
    assert arrived(loader, again) == (ALIGNED, "cold")


def test_a_file_that_hangs_holds_up_nobody_else(loader: MemoryLoader, held: Held) -> None:
    hanging = loader.ask(part("hanging"), "")
    while not held.read:
        time.sleep(0.001)
    loader.find = lambda part, tenant: (Found(ALIGNED), "cold")  # type: ignore[method-assign]
    assert arrived(loader, loader.ask(part("other"), "")) == (ALIGNED, "cold")
    assert not hanging.result.done()


def test_a_failure_is_told_and_not_kept(loader: MemoryLoader, held: Held) -> None:
    held.wrong = PackageCorrupt("no such bytes")
    held.go_on.set()
    with pytest.raises(PackageCorrupt, match="no such bytes"):
        arrived(loader, loader.ask(part(), ""))
    held.wrong = None
    assert arrived(loader, loader.ask(part(), "")) == (ALIGNED, "cold")


def test_what_cannot_be_kept_fails_its_askers_and_not_the_engine(
    loader: MemoryLoader, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(key: object, memory: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loader.warm, "put", full)
    held.go_on.set()
    with pytest.raises(MemoryError):
        arrived(loader, loader.ask(part(), ""))
    assert loader.under_way == {}


def test_a_prefetch_is_pending_until_its_memory_is_warm(loader: MemoryLoader, held: Held) -> None:
    params = LoadParams(parts=(part(),))
    loader.warm.limit = 0
    assert loader.prefetch("ticket", params, True) == PENDING
    assert loader.prefetch("ticket", params, True) == PENDING
    held.go_on.set()
    wait([loader.ask(part(), "").found], SECONDS)
    assert loader.prefetch("ticket", params, True) == "cold"
    assert loader.prefetch("another", params, False) == "warm"
    assert loader.prefetches == {}
    loader.warm.put(("large", ""), ALIGNED)
    assert loader.warm.get(("mem", "map")) is ALIGNED
    assert loader.evict("mem")
    assert not loader.evict("mem")


def test_a_prefetch_says_what_went_wrong(loader: MemoryLoader, held: Held) -> None:
    held.wrong = PackageCorrupt("no such bytes")
    held.go_on.set()
    params = LoadParams(parts=(part(),))
    found = PENDING
    while found == PENDING:
        found = loader.prefetch("ticket", params, False)
    assert found == "no such bytes."


def test_what_was_aligned_once_is_read_from_disk(loader: MemoryLoader, tmp_path: Path) -> None:
    loader.disk = DiskTier(tmp_path, 2**30, "weights", torch.bfloat16)
    held = Held(loader)
    held.go_on.set()
    assert arrived(loader, loader.ask(part(), "")) == (ALIGNED, "cold")
    loader.disk.thread.shutdown()
    loader.warm = WarmTier(2**30)
    del loader.find, loader.block
    for _ in ("from disk", "from memory"):
        found, temperature = arrived(loader, loader.ask(part(), ""))
        assert (found.ids, temperature) == (ALIGNED.ids, "warm")
    assert loader.evict("mem")
    assert list(tmp_path.glob("*.aligned")) == []


def test_a_package_is_aligned_by_its_map(
    loader: MemoryLoader,
    make_package: Callable[..., Package],
    wmatrix: WMatrix,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("awareness_vllm.align.realign.BLOCK", 7)
    package = make_package("the quick brown fox, naïve dogs")
    loader.memories.folder = folder
    loader.wmatrices["map"] = wmatrix
    loader.embed = lambda ids: torch.randn(1000, 6, generator=torch.manual_seed(3))[ids]
    found, _ = arrived(loader, loader.ask(part(publish(package, tmp_path).stem), ""))
    expected = realign(package, wmatrix, folder, loader.embed, dtype=torch.bfloat16)
    assert found.ids == expected.ids
    for one, other in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
        assert torch.equal(one, other)


def test_a_map_that_the_server_lacks_is_refused(
    loader: MemoryLoader, make_package: Callable[..., Package], tmp_path: Path
) -> None:
    memory = publish(make_package(), tmp_path).stem
    with pytest.raises(UnsupportedModel, match="another W-Matrix"):
        arrived(loader, loader.ask(part(memory, "f" * 64), ""))


def test_a_truncated_package_changes_nothing_that_was_read(
    loader: MemoryLoader, make_package: Callable[..., Package], tmp_path: Path
) -> None:
    """safetensors maps files: reading on after one was truncated would kill the process."""
    package = make_package()
    path = publish(package, tmp_path)
    memory, _ = arrived(loader, loader.ask(part(path.stem, ""), ""))
    with path.open("r+b") as file:
        file.truncate(8)
    for before, after in zip(package.keys, memory.keys, strict=True):
        assert torch.equal(before, after)


def test_the_heads_that_were_used_last_are_kept(loader: MemoryLoader) -> None:
    for number in range(HEADS):
        loader.keep_head(f"head-{number}", ALIGNED)
    assert arrived(loader, loader.ask(part("head-0"), "")) == (ALIGNED, "warm")
    loader.keep_head("new", ALIGNED)
    assert "head-0" in loader.heads
    assert "head-1" not in loader.heads


def test_several_ranks_look_their_embedding_up_together_and_once() -> None:
    calls = []

    class Model(torch.nn.Embedding):
        def embed_input_ids(self, ids: Tensor) -> Tensor:
            calls.append(len(ids))
            return self(ids)

    model = Model(5000, 4).bfloat16()
    ids = torch.tensor([4999, 0, 4097])
    alone = embedding_of(model, 5000, 1)(ids)
    assert (alone.dtype, calls) == (torch.float32, [3])
    together = embedding_of(model, 5000, 2)
    assert sum(calls) == 5003
    assert torch.equal(together(ids), alone)
    assert sum(calls) == 5003
