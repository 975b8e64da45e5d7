"""Alignments of a worker: made once, block by block, for the requests that still wait for them."""

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
from loader_stubs import ALIGNED, SECONDS, StubAlignment, loader_of, part
from paged_stubs import embed, latent_of, paged_map
from torch import Tensor

from awareness_vllm.align.encoding import LatentEncoding
from awareness_vllm.align.paged import PagedMap
from awareness_vllm.align.realign import realign
from awareness_vllm.align.workspace import LANES
from awareness_vllm.errors import OutOfDeviceMemory, PackageCorrupt, UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.serving.connector.loader import (
    MAX_HEADS,
    OUT_OF_MEMORY_S,
    STEP_BUDGET_S,
    LoadedSource,
    MemoryLoader,
    PendingAlignment,
    embedding_of,
)
from awareness_vllm.serving.tiers import DiskTier, WarmTier
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


@pytest.fixture
def stub(loader: MemoryLoader, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubAlignment]:
    stub = StubAlignment(loader, monkeypatch)
    yield stub
    stub.go_on.set()


@pytest.fixture
def loader(folder: Path, geometry: Geometry, tmp_path: Path) -> MemoryLoader:
    return loader_of(folder, geometry, tmp_path)


def result_of(loader: MemoryLoader, alignment: PendingAlignment) -> tuple[Any, str]:
    """An alignment's memory and temperature, after as many steps as it takes."""
    wait([alignment.source], SECONDS)
    while not alignment.result.done():
        loader.advance()
    return alignment.result.result()


def test_two_requests_for_one_cold_memory_align_it_once(
    loader: MemoryLoader, stub: StubAlignment
) -> None:
    first, second = loader.request(part(), ""), loader.request(part(), "another tenant's")
    assert first is second
    other = loader.request(part("mem", "another map"), "")
    assert other is not first
    loader.advance()
    assert not first.result.done()
    stub.go_on.set()
    for alignment in (first, other):
        assert result_of(loader, alignment) == (ALIGNED, "cold")
    assert result_of(loader, loader.request(part(), "")) == (ALIGNED, "warm")
    assert (stub.read, stub.blocks) == (["mem"] * 2, ["mem"] * 2)
    assert loader.pending == {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a moment."""
    clock = itertools.count()
    monkeypatch.setattr(
        "awareness_vllm.serving.connector.loader.time",
        SimpleNamespace(perf_counter=lambda: next(clock) * STEP_BUDGET_S),
    )


@pytest.mark.usefixtures("clock")
def test_a_step_that_others_wait_for_aligns_one_block(
    loader: MemoryLoader, stub: StubAlignment
) -> None:
    stub.go_on.set()
    stub.needed = 3
    alignments = [loader.request(part(name), "") for name in ("a", "b")]
    wait([alignment.source for alignment in alignments], SECONDS)
    loader.advance()
    assert stub.blocks == ["a"]
    loader.advance(2.5 * STEP_BUDGET_S)
    assert stub.blocks == ["a"] * 3 + ["b"]
    assert [alignment.result.done() for alignment in alignments] == [True, False]


@pytest.mark.usefixtures("clock")
def test_an_alignment_ends_when_nobody_wants_it_any_more(
    loader: MemoryLoader, stub: StubAlignment
) -> None:
    stub.needed = 2
    stub.go_on.set()
    first = loader.request(part(), "")
    assert loader.request(part(), "") is first
    wait([first.source], SECONDS)
    loader.advance()
    loader.release(first)
    assert list(loader.pending.values()) == [first]
    loader.release(first)
    loader.advance()
    assert stub.blocks == ["mem"]
    again = loader.request(part(), "")
    assert again is not first
    loader.release(first)
    assert result_of(loader, again) == (ALIGNED, "cold")


def test_a_file_that_hangs_holds_up_nobody_else(
    loader: MemoryLoader, stub: StubAlignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = loader.request(part("hanging"), "")
    while not stub.read:
        time.sleep(0.001)
    monkeypatch.setattr(loader, "read_source", lambda *args: LoadedSource("cold", ALIGNED))
    assert result_of(loader, loader.request(part("other"), "")) == (ALIGNED, "cold")
    assert not hanging.result.done()


def test_a_failure_is_raised_and_not_kept(loader: MemoryLoader, stub: StubAlignment) -> None:
    stub.error = PackageCorrupt("no such bytes")
    stub.go_on.set()
    with pytest.raises(PackageCorrupt, match="no such bytes"):
        result_of(loader, loader.request(part(), ""))
    stub.error = None
    assert result_of(loader, loader.request(part(), "")) == (ALIGNED, "cold")


def test_a_memory_that_cannot_be_kept_fails_its_requests_and_not_the_engine(
    loader: MemoryLoader, stub: StubAlignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(key: object, memory: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loader.warm, "put", full)
    stub.go_on.set()
    with pytest.raises(MemoryError):
        result_of(loader, loader.request(part(), ""))
    assert loader.pending == {}


def test_a_memory_that_was_aligned_once_is_read_from_disk(
    loader: MemoryLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.disk = DiskTier(tmp_path, 2**30, "weights", torch.bfloat16)
    monkeypatch.setattr(loader, "source_bytes", lambda part, tenant: 1)
    with monkeypatch.context() as patch:
        stub = StubAlignment(loader, patch)
        stub.go_on.set()
        assert result_of(loader, loader.request(part(), "")) == (ALIGNED, "cold")
    loader.disk.thread.shutdown()
    loader.warm = WarmTier(2**30)
    for _ in ("from disk", "from memory"):
        memory, temperature = result_of(loader, loader.request(part(), ""))
        assert (memory.ids, temperature) == (ALIGNED.ids, "warm")
    assert loader.evict("mem", "")
    assert list(tmp_path.glob("*.aligned")) == []


def test_a_package_is_aligned_by_its_map(
    loader: MemoryLoader,
    make_package: Callable[..., Package],
    wmatrix: WMatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("awareness_vllm.align.realign.BLOCK", 7)
    package = make_package("the quick brown fox, naïve dogs")
    loader.wmatrices["map"] = wmatrix
    loader.embed = lambda ids: torch.randn(1000, 6, generator=torch.manual_seed(3))[ids]
    memory, _ = result_of(loader, loader.request(part(publish(package, tmp_path).stem), ""))
    expected = realign(package, wmatrix, loader.model.folder, loader.embed, dtype=torch.bfloat16)
    assert memory.ids == expected.ids
    states = zip(memory.keys + memory.values, expected.keys + expected.values, strict=True)
    for one, other in states:
        assert torch.equal(one, other)


def test_a_map_that_the_server_lacks_is_refused(
    loader: MemoryLoader, make_package: Callable[..., Package], tmp_path: Path
) -> None:
    memory = publish(make_package(), tmp_path).stem
    with pytest.raises(UnsupportedModel, match="another W-Matrix"):
        result_of(loader, loader.request(part(memory, "f" * 64), ""))


def test_a_truncated_package_changes_nothing_that_was_read(
    loader: MemoryLoader, make_package: Callable[..., Package], tmp_path: Path
) -> None:
    """safetensors maps files: reading on after one was truncated would kill the process."""
    package = make_package()
    path = publish(package, tmp_path)
    memory, _ = result_of(loader, loader.request(part(path.stem, ""), ""))
    with path.open("r+b") as file:
        file.truncate(8)
    for before, after in zip(package.keys, memory.keys, strict=True):
        assert torch.equal(before, after)


def test_the_heads_that_were_used_last_are_kept(loader: MemoryLoader) -> None:
    for number in range(MAX_HEADS):
        loader.keep_head(f"head-{number}", ALIGNED)
    assert result_of(loader, loader.request(part("head-0"), "")) == (ALIGNED, "warm")
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


def test_a_package_of_another_digest_is_never_used(
    loader: MemoryLoader, make_package: Callable[..., Package], wmatrix: WMatrix, tmp_path: Path
) -> None:
    # It is hashed while it is aligned: the alignment is complete before it is refused.
    loader.wmatrices["map"] = wmatrix
    loader.embed = lambda ids: torch.randn(1000, 6, generator=torch.manual_seed(3))[ids]
    memory = publish(make_package("the quick brown fox"), tmp_path).stem
    for wmatrix_name in ("map", ""):
        forged = part(memory, wmatrix_name).model_copy(update={"digest": "0" * 64})
        alignment = loader.request(forged, "")
        with pytest.raises(PackageCorrupt, match="sha256"):
            result_of(loader, alignment)
        assert loader.warm.get(forged.key) is None


# On a device


@pytest.fixture
def device(loader: MemoryLoader, wmatrix: WMatrix) -> PagedMap:
    """The device's map of `loader`, in chunks of 7 rows."""
    loader.wmatrices["map"] = wmatrix
    loader.embed = embed
    paged = loader.paged["map"] = paged_map(wmatrix, 7)
    return paged


def test_a_latent_takes_a_step_for_each_chunk(
    loader: MemoryLoader, device: PagedMap, make_package: Callable[..., Package], tmp_path: Path
) -> None:
    package = make_package("the quick brown fox, naïve dogs")
    alignment = loader.request(part(publish(package, tmp_path).stem), "")
    assert list(alignment.running) == [alignment.source]
    wait([alignment.source], SECONDS)
    begun = []
    while not alignment.result.done():
        loader.advance()
        assert isinstance(alignment.work, LatentEncoding)
        begun.append(alignment.work.begin)
        wait(alignment.running, SECONDS)
    chunks = [begin - before for before, begin in itertools.pairwise([0, *begun])]
    assert set(chunks[:-2]) == {7}
    latent, temperature = alignment.result.result()
    assert temperature == "cold"
    expected = latent_of(device, package, loader.model.folder, embed)
    assert latent.ids == expected.ids
    assert torch.equal(latent.rows, expected.rows)


def test_a_step_passes_by_a_chunk_that_is_on_its_way(
    loader: MemoryLoader, device: PagedMap, make_package: Callable[..., Package], tmp_path: Path
) -> None:
    go_on = threading.Event()
    loader.embed = lambda ids: (go_on.wait(SECONDS), embed(ids))[1]
    package = make_package("the quick brown fox, naïve dogs")
    alignment = loader.request(part(publish(package, tmp_path).stem), "")
    wait([alignment.source], SECONDS)
    # A chunk on each lane; then nothing is begun, and nobody need ask again at once.
    assert [loader.advance() for _ in range(LANES + 1)] == [True] * LANES + [False]
    chunks = list(alignment.running)
    assert len(chunks) == LANES
    assert not any(chunk.done() for chunk in chunks)
    # Another memory for which no lane is left waits for the same.
    other = loader.request(part(publish(make_package("a fox"), tmp_path).stem), "")
    wait([other.source], SECONDS)
    assert not loader.advance()
    assert list(other.running) == chunks
    go_on.set()
    for one in (alignment, other):
        assert result_of(loader, one)[1] == "cold"


def test_memories_that_need_no_lane_do_not_wait_for_one(
    loader: MemoryLoader, device: PagedMap, make_package: Callable[..., Package], tmp_path: Path
) -> None:
    """All lanes are taken: the step neither waits nor turns in circles, and a copy is loaded."""
    lanes = [device.workspace.free.get() for _ in device.workspace.lanes]
    memory = publish(make_package(), tmp_path).stem
    mapped, copied = (loader.request(part(memory, map_), "") for map_ in ("map", ""))
    wait([mapped.source, copied.source], SECONDS)
    assert loader.advance()
    assert copied.result.done()
    assert not mapped.result.done()
    assert mapped.work is not None
    for lane in lanes:
        device.workspace.free.put(lane)
    assert result_of(loader, mapped)[1] == "cold"


def test_a_memory_that_the_device_has_no_room_for_fails_alone_and_is_not_tried_again_at_once(
    loader: MemoryLoader,
    device: PagedMap,
    make_package: Callable[..., Package],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large, small = (publish(make_package(text), tmp_path).stem for text in ("naïve dogs", "a fox"))
    first = loader.request(part(large), "")
    wait([first.source], SECONDS)

    def full(ids: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loader.embed = full
    with pytest.raises(OutOfDeviceMemory, match="--gpu-memory-utilization"):
        result_of(loader, first)
    loader.embed = embed
    assert result_of(loader, loader.request(part(small), ""))[1] == "cold"
    with monkeypatch.context() as patch:
        patch.setattr(loader, "read", lambda *args: pytest.fail("it was tried again"))
        again = loader.request(part(large), "")
        with pytest.raises(OutOfDeviceMemory):
            again.result.result(0)
    assert loader.pending == {}
    now = time.perf_counter()
    monkeypatch.setattr(
        "awareness_vllm.serving.connector.loader.time",
        SimpleNamespace(perf_counter=lambda: now + OUT_OF_MEMORY_S),
    )
    assert result_of(loader, loader.request(part(large), ""))[1] == "cold"
