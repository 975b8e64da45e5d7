"""Captures: only what was announced, whole or not at all, and what went wrong is told once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import AwarenessError
from awareness_vllm.serving.connector.capture_queue import PENDING, Captures, States, as_memory
from awareness_vllm.serving.tiers import WarmTier

pytestmark = pytest.mark.unit

STATES = {"layers.0.key": torch.ones(3, 1, 2), "layers.0.value": torch.zeros(3, 1, 2)}


def states() -> States:
    return STATES


def broken() -> States:
    raise RuntimeError("the blocks are gone")


def state_of(captures: Captures, name: str) -> str:
    """What is known once the files are written."""
    captures.thread.shutdown()
    return captures.state(name)


def test_nothing_is_read_back_that_was_not_announced() -> None:
    captures = Captures()
    assert not captures.expects("forged")
    captures.announce("real", "")
    assert captures.expects("real")
    captures.forget("real")
    assert not captures.expects("real")
    assert Captures(everything=True).expects("anything")


def test_a_capture_goes_into_its_file_and_is_told_once(tmp_path: Path) -> None:
    captures, path = Captures(), tmp_path / "states"
    captures.announce("a", str(path))
    assert captures.state("a") == PENDING
    captures.take("a", states)
    assert state_of(captures, "a") == ""
    assert torch.equal(load_file(path)["layers.0.key"], STATES["layers.0.key"])
    assert captures.state("a") == PENDING
    assert [found.name for found in tmp_path.iterdir()] == ["states"]


def test_a_capture_without_a_file_is_collected_once() -> None:
    captures = Captures()
    captures.announce("head", "")
    captures.take("head", states)
    memory = as_memory(captures.collect("head"), [5, 6, 7])
    assert memory.ids == [5, 6, 7]
    assert torch.equal(memory.keys[0], STATES["layers.0.key"])
    assert torch.equal(memory.values[0], STATES["layers.0.value"])
    with pytest.raises(AwarenessError, match="nothing was captured"):
        captures.collect("head")


@pytest.mark.parametrize("path", ["", "states"])
def test_what_went_wrong_while_reading_is_told(path: str, tmp_path: Path) -> None:
    captures = Captures()
    captures.announce("a", str(tmp_path / path) if path else "")
    captures.take("a", broken)
    if path:
        assert state_of(captures, "a") == "the blocks are gone"
    else:
        with pytest.raises(AwarenessError, match="the blocks are gone"):
            captures.collect("a")
    assert list(tmp_path.iterdir()) == []


def test_what_went_wrong_while_writing_is_told(tmp_path: Path) -> None:
    captures = Captures()
    captures.announce("a", str(tmp_path / "no such folder" / "states"))
    captures.take("a", states)
    assert "No such file" in state_of(captures, "a")


def test_an_offline_engine_writes_before_it_goes_on(tmp_path: Path) -> None:
    captures, path = Captures(everything=True), tmp_path / "states"
    captures.take(str(path), states)
    assert set(load_file(path)) == set(STATES)


def memory(size: int) -> AlignedMemory:
    """A memory of 8 bytes a token."""
    state = torch.zeros(size, 1, 1)
    return AlignedMemory(list(range(size)), [state], [state])


def test_what_is_pinned_stays_warm() -> None:
    warm = WarmTier(8 * 10)
    for name in ("pinned", "old", "new"):
        warm.put((name, ""), memory(4))
        warm.pinned.add(("pinned", ""))
    assert [key[0] for key in warm.memories] == ["pinned", "new"]
    warm.put(("large", ""), memory(100))
    assert [key[0] for key in warm.memories] == ["pinned", "large"]


def test_what_is_dropped_is_gone_through_every_map() -> None:
    warm = WarmTier(8 * 100)
    for wmatrix in ("one", "two"):
        warm.put(("mem", wmatrix), memory(4))
    warm.put(("other", ""), memory(4))
    warm.pinned.add(("mem", "one"))
    assert warm.drop("mem")
    assert not warm.drop("mem")
    assert list(warm.memories) == [("other", "")]
    assert warm.pinned == set()
