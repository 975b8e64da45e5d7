"""Aligned memories in host memory and on disk: bounded in bytes, least recently used out first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.packages.manifest import id_of
from awareness_vllm.serving.tiers import DiskTier, WarmTier

pytestmark = pytest.mark.unit

NAME, OTHER, THIRD = (digit * 64 for digit in "012")


def memory(seed: int = 0) -> AlignedMemory:
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(5, 2, 4, generator=generator).bfloat16() for _ in range(4)]
    return AlignedMemory([seed, 1, 2, 3, 4], states[:2], states[2:])


def tier(folder: Path, limit: int = 2**20, model: str = "w", dtype: str = "bfloat16") -> DiskTier:
    return DiskTier(folder, limit, model, getattr(torch, dtype))


def put(disk: DiskTier, name: str, memory: AlignedMemory) -> None:
    """Write at once, as the thread does later."""
    disk._put((name, "map"), memory)


def file_of(disk: DiskTier, name: str) -> Path:
    (path,) = disk.folder.glob(f"{name}.*")
    return path


# In host memory


def memory_of(tokens: int) -> AlignedMemory:
    """A memory of 8 bytes a token."""
    state = torch.zeros(tokens, 1, 1)
    return AlignedMemory(list(range(tokens)), [state], [state])


def names(warm: WarmTier) -> list[str]:
    return [name for name, _ in warm.memories]


def test_the_warm_tier_drops_the_least_recently_used_by_bytes() -> None:
    warm = WarmTier(100 * 8)
    for name, size in (("a", 40), ("b", 40), ("c", 20)):
        warm.put((name, ""), memory_of(size))
    assert warm.get(("a", "")) is not None
    warm.put(("d", ""), memory_of(1))
    assert names(warm) == ["c", "a", "d"]
    assert warm.get(("b", "")) is None
    warm.put(("e", ""), memory_of(99))
    assert names(warm) == ["d", "e"]


def test_the_warm_tier_keeps_one_memory_that_is_too_large() -> None:
    warm = WarmTier(8)
    warm.put(("a", ""), memory_of(5))
    warm.put(("b", ""), memory_of(50))
    assert names(warm) == ["b"]
    assert warm.get(("b", "other map")) is None


def test_pinned_memories_stay_warm() -> None:
    warm = WarmTier(8 * 10)
    for name in ("pinned", "old", "new"):
        warm.put((name, ""), memory_of(4))
        warm.pinned.add(("pinned", ""))
    assert names(warm) == ["pinned", "new"]
    warm.put(("large", ""), memory_of(100))
    assert names(warm) == ["pinned", "large"]


def test_a_dropped_memory_is_gone_through_every_map() -> None:
    warm = WarmTier(8 * 100)
    for wmatrix in ("one", "two"):
        warm.put((NAME, wmatrix), memory_of(4))
    warm.put((OTHER, ""), memory_of(4))
    warm.pinned.add((NAME, "one"))
    assert warm.drop(id_of(NAME))
    assert not warm.drop(id_of(NAME))
    assert list(warm.memories) == [(OTHER, "")]
    assert warm.pinned == set()


# On disk


def test_a_memory_comes_back_bit_for_bit(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    disk.put((NAME, "map"), memory())
    disk.thread.shutdown()
    restored = disk.get((NAME, "map"))
    assert restored is not None
    expected = memory()
    assert restored.ids == expected.ids
    states = zip(restored.keys + restored.values, expected.keys + expected.values, strict=True)
    for one, other in states:
        assert torch.equal(one, other)
    assert [path.suffix for path in tmp_path.iterdir()] == [".aligned"]


def test_another_map_model_or_dtype_is_another_memory(tmp_path: Path) -> None:
    put(tier(tmp_path), NAME, memory())
    assert tier(tmp_path).get((NAME, "map")) is not None
    assert tier(tmp_path).get((NAME, "another")) is None
    assert tier(tmp_path, model="v").get((NAME, "map")) is None
    assert tier(tmp_path, dtype="float16").get((NAME, "map")) is None


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_file_that_cannot_be_read_is_dropped(tmp_path: Path, damage: bytes | None) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    assert disk.get((NAME, "map")) is None
    assert not path.exists()


def test_the_least_recently_used_goes_first_and_the_newest_stays(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())
    size = file_of(disk, NAME).stat().st_size
    put(disk, OTHER, memory(1))
    for age, name in enumerate((OTHER, NAME)):
        os.utime(file_of(disk, name), (age, age))
    disk.get((OTHER, "map"))
    disk.limit = 2 * size + 10
    put(disk, THIRD, memory(2))
    assert disk.get((NAME, "map")) is None
    assert disk.get((OTHER, "map")) is not None
    disk.limit = 1
    put(disk, NAME, memory())
    assert [path.name[:64] for path in tmp_path.iterdir()] == [NAME]


def test_a_disk_that_cannot_be_written_costs_no_request(tmp_path: Path) -> None:
    disk = tier(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    put(disk, NAME, memory())
    assert disk.get((NAME, "map")) is None


def test_a_file_is_dropped_for_every_map(tmp_path: Path) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())
    disk._put((NAME, "another"), memory())
    put(disk, OTHER, memory(1))
    assert disk.drop(id_of(NAME))
    assert not disk.drop(id_of(NAME))
    assert [path.name[:64] for path in tmp_path.iterdir()] == [OTHER]


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.99])
def test_a_flipped_bit_makes_a_file_a_strangers(tmp_path: Path, where: float) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())
    path = file_of(disk, NAME)
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= 1
    path.write_bytes(raw)
    assert disk.get((NAME, "map")) is None
    assert not path.exists()
    put(disk, NAME, memory())
    assert disk.get((NAME, "map")) is not None


def test_nobody_without_the_homes_key_can_add_a_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWARENESS_HOME", str(tmp_path / "attacker"))
        put(tier(tmp_path / "cache"), NAME, memory(1))
    disk = tier(tmp_path / "cache")
    assert disk.get((NAME, "map")) is None
    # Nor give one memory's file another one's name.
    put(disk, NAME, memory())
    path = file_of(disk, NAME)
    path.rename(path.with_name(path.name.replace(NAME, OTHER)))
    assert disk.get((OTHER, "map")) is None


def test_a_link_is_no_entry(tmp_path: Path) -> None:
    disk = tier(tmp_path / "cache")
    put(disk, NAME, memory())
    path = file_of(disk, NAME)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert disk.get((NAME, "map")) is None


def test_states_that_are_not_finite_are_no_entry(tmp_path: Path) -> None:
    disk, poison = tier(tmp_path), memory()
    poison.keys[0][2, 0, 0] = float("nan")
    put(disk, NAME, poison)
    assert disk.get((NAME, "map")) is None


def test_a_time_that_cannot_be_set_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tier(tmp_path)
    put(disk, NAME, memory())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    assert disk.get((NAME, "map")) is not None
    monkeypatch.setattr(Path, "unlink", refuse)
    file_of(disk, NAME).write_bytes(b"damaged")
    assert disk.get((NAME, "map")) is None
    assert not disk.drop(id_of(NAME))
