"""A store is reached by strict IDs only, and what it hands out is what the ID names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awareness_vllm.errors import InvalidMemoryId, MemoryNotFound, PackageCorrupt
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.packages.store import Store

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
        store.checked_path(GOOD)


def test_ids_lists_packages_only(store: Store) -> None:
    (memory_id,) = store.ids()
    (store.folder / "notes.txt").write_text("x")
    (store.folder / "mem_short.safetensors").write_text("x")
    (store.folder / ".publish-x").write_text("x")
    assert list(store.ids()) == [memory_id]
    assert store.checked_path(memory_id) == store.folder / f"{memory_id}.safetensors"


def test_a_store_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert list(Store(tmp_path / "nothing").ids()) == []


def test_an_altered_package_is_refused(store: Store) -> None:
    (memory_id,) = store.ids()
    path = store.path(memory_id)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(PackageCorrupt):
        store.checked_path(memory_id)


def test_a_package_altered_after_it_was_checked_is_noticed(store: Store) -> None:
    (memory_id,) = store.ids()
    path = store.checked_path(memory_id)
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    # The same size and, on coarse clocks, perhaps the same time: move it by the least step.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(PackageCorrupt):
        store.checked_path(memory_id)


def test_a_checked_package_is_hashed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (memory_id,) = store.ids()
    store.checked_path(memory_id)

    def fail(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr("awareness_vllm.packages.store.check_bytes", fail)
    store.checked_path(memory_id)
