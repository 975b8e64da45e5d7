"""A store is reached by strict IDs only, and what it hands out is what the ID names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awareness_vllm.errors import InvalidMemoryId, MemoryNotFound
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.packages.origin import is_own
from awareness_vllm.packages.store import Store, version_of
from awareness_vllm.tensor_file import digest_of

pytestmark = pytest.mark.unit

GOOD = "mem_" + "0123456789abcdef" * 2


@pytest.fixture
def store(make_package: Callable[..., Package], tmp_path: Path) -> Store:
    publish(make_package(), tmp_path)
    return Store(tmp_path)


@settings(max_examples=300, deadline=None)
@given(
    identity=st.one_of(
        st.text(),
        st.from_regex(r"mem_[0-9a-fA-F]{0,40}"),
        st.sampled_from(["", "../", "/etc/", "./", "..\\", "%2e%2e/", "~/"]).map(
            lambda path: path + GOOD
        ),
        st.sampled_from(["\n", "\0", "/", ".safetensors", " ", "/../" + GOOD]).map(
            lambda tail: GOOD + tail
        ),
        st.integers(),
        st.none(),
        st.lists(st.just(GOOD), max_size=1),
        st.binary(),
    )
)
def test_only_the_strict_pattern_is_an_id(identity: object) -> None:
    store = Store(Path("/nonexistent"))
    strict = isinstance(identity, str) and re.fullmatch(r"mem_[0-9a-f]{32}", identity, re.ASCII)
    with pytest.raises(MemoryNotFound if strict else InvalidMemoryId) as caught:
        store.path(identity)
    assert caught.value.status == (404 if strict else 400)


def test_an_unknown_id_is_not_found(store: Store) -> None:
    with pytest.raises(MemoryNotFound, match=GOOD):
        store.path(GOOD)


def test_ids_lists_packages_only(store: Store) -> None:
    (memory_id,) = store.ids()
    (store.folder / "notes.txt").write_text("x")
    (store.folder / "mem_short.safetensors").write_text("x")
    (store.folder / ".publish-x").write_text("x")
    assert list(store.ids()) == [memory_id]
    assert store.path(memory_id) == store.folder / f"{memory_id}.safetensors"


def test_a_store_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert list(Store(tmp_path / "nothing").ids()) == []


def test_a_package_that_is_there_stays(make_package: Callable[..., Package], store: Store) -> None:
    (memory_id,) = store.ids()
    before = store.path(memory_id).stat()
    path = publish(make_package(), store.folder)
    assert path.stem == memory_id
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_no_package_of_ours_is_ever_without_its_seal(
    make_package: Callable[..., Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed: list[bool] = []

    def killed(draft: Path, path: Path) -> None:
        sealed.append(is_own(digest_of(draft)))
        raise OSError("no space left")

    monkeypatch.setattr("awareness_vllm.packages.file.put_in_place", killed)
    with pytest.raises(OSError, match="space"):
        publish(make_package("a text of its own"), tmp_path)
    assert sealed == [True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["altered", "a link", "a dangling link"])
def test_a_damaged_package_is_published_anew(
    make_package: Callable[..., Package], store: Store, tmp_path: Path, damage: str
) -> None:
    (memory_id,) = store.ids()
    path = store.path(memory_id)
    whole = path.read_bytes()
    if damage == "altered":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        elsewhere = path.rename(tmp_path / "elsewhere")
        path.symlink_to(elsewhere if damage == "a link" else tmp_path / "nowhere")
    publish(make_package(), store.folder)
    assert path.read_bytes() == whole
    assert not path.is_symlink()


def test_the_version_changes_with_every_write(store: Store) -> None:
    (memory_id,) = store.ids()
    path = store.path(memory_id)
    before, facts = version_of(path), path.stat()
    assert version_of(path) == before
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    # Of the same size, and the times set back to what they were.
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert version_of(path) != before


def test_a_file_that_went_away_has_no_version(store: Store) -> None:
    (memory_id,) = store.ids()
    path = store.path(memory_id)
    path.unlink()
    with pytest.raises(MemoryNotFound):
        version_of(path)
