"""Aligned memories on disk: whole or not there, for one model, bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.serving.tiers import DiskTier

pytestmark = pytest.mark.unit

NAME, OTHER, THIRD = (f"mem_{digit * 32}" for digit in "012")


def memory(seed: int = 0) -> AlignedMemory:
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(5, 2, 4, generator=generator).bfloat16() for _ in range(4)]
    return AlignedMemory([seed, 1, 2, 3, 4], states[:2], states[2:])


def tier(folder: Path, limit: int = 2**20, model: str = "w", dtype: str = "bfloat16") -> DiskTier:
    return DiskTier(folder, limit, model, getattr(torch, dtype))


def put(disk: DiskTier, name: str, found: AlignedMemory) -> None:
    """Write at once, as the thread does later."""
    disk._put((name, "map"), found)


def test_what_was_put_comes_back_bit_for_bit(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    disk.put((NAME, "map"), memory())
    disk.thread.shutdown()
    found = disk.get((NAME, "map"))
    assert found is not None
    assert found.ids == memory().ids
    for one, other in zip(found.keys + found.values, memory().keys + memory().values, strict=True):
        assert torch.equal(one, other)
    assert [path.suffix for path in tmp_path.iterdir()] == [".aligned"]


def test_another_map_model_or_dtype_is_another_memory(tmp_path: Path) -> None:
    put(tier(tmp_path), NAME, memory())
    assert tier(tmp_path).get((NAME, "map")) is not None
    assert tier(tmp_path).get((NAME, "another")) is None
    assert tier(tmp_path, model="v").get((NAME, "map")) is None
    assert tier(tmp_path, dtype="float16").get((NAME, "map")) is None


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_what_cannot_be_read_is_dropped(tmp_path: Path, damage: bytes | None) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())
    path = disk.path((NAME, "map"))
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    assert disk.get((NAME, "map")) is None
    assert not path.exists()


def test_the_least_recently_used_goes_first_and_the_newest_stays(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())
    size = disk.path((NAME, "map")).stat().st_size
    put(disk, OTHER, memory(1))
    for age, name in enumerate((OTHER, NAME)):
        os.utime(disk.path((name, "map")), (age, age))
    disk.get((OTHER, "map"))
    disk.limit = 2 * size + 10
    put(disk, THIRD, memory(2))
    assert disk.get((NAME, "map")) is None
    assert disk.get((OTHER, "map")) is not None
    disk.limit = 1
    put(disk, NAME, memory())
    assert [path.name[:36] for path in tmp_path.iterdir()] == [NAME]


def test_a_disk_that_cannot_be_written_costs_no_request(tmp_path: Path) -> None:
    disk = tier(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    put(disk, NAME, memory())
    assert disk.get((NAME, "map")) is None


def test_what_is_dropped_is_gone_through_every_map(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())
    disk._put((NAME, "another"), memory())
    put(disk, OTHER, memory(1))
    assert disk.drop(NAME)
    assert not disk.drop(NAME)
    assert [path.name[:36] for path in tmp_path.iterdir()] == [OTHER]
