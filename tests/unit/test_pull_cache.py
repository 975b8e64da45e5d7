"""The cache of pulled files: one download for all who want it, a limit, and `awareness gc`."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from awareness_vllm.errors import BadInput, StorageFull
from awareness_vllm.marketplace.files import pull_file, push_file
from awareness_vllm.oci.artefact import Layer, descriptor_of
from awareness_vllm.oci.cache import FRESH, STALE, Cache, default_limit
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.download import Download, storage_full
from awareness_vllm.oci.layout import Layout
from awareness_vllm.oci.repository import Repository
from awareness_vllm.packages.file import Package, publish

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]

A, B, C = (letter * 1000 for letter in (b"a", b"b", b"c"))
LONG_AGO = time.time() - 2 * FRESH


@pytest.fixture
def layout(tmp_path: Path) -> Repository:
    repository = open_repository(tmp_path / "layout")
    for content in (A, B, C):
        repository.upload(Layer(content, descriptor_of(content, "text/plain")))
    return repository


def fetched(cache: Cache, layout: Repository, content: bytes) -> Path:
    descriptor = descriptor_of(content, "text/plain")
    return cache.fetch(layout, descriptor, f"{descriptor.hex}.wmatrix")


def age(path: Path, seconds: float = 2 * FRESH) -> None:
    """Have a file, and what lies beside it, be so old."""
    for file in path.parent.glob(f"{path.name}*"):
        os.utime(file, (time.time() - seconds,) * 2)


def test_all_who_want_it_wait_for_one_download(
    layout: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, calls = Layout.fetch, []

    def slow(self: Layout, *args: object) -> None:
        calls.append(args)
        time.sleep(0.2)
        fetch(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Layout, "fetch", slow)
    cache = Cache(limit=1 << 20)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: fetched(cache, layout, A), range(4)))
    assert len(calls) == len(paths) == 1
    assert paths.pop().read_bytes() == A
    assert list((cache.folder / "partial").iterdir()) == []


def test_what_was_not_used_for_the_longest_goes(layout: Repository) -> None:
    cache = Cache(limit=2500)
    paths = [fetched(cache, layout, content) for content in (A, B)]
    for path in paths:
        age(path)
    cache.used(paths[0].name)
    facts = paths[0].stat()
    (cache.folder / f"{paths[1].name}.sig").write_bytes(b"its signature")
    third = fetched(cache, layout, C)
    assert (paths[0].is_file(), paths[1].is_file(), third.is_file()) == (True, False, True)
    assert not list(cache.folder.glob(f"{paths[1].name}*"))
    # Servers see by a file's own times whether somebody has written to it.
    assert paths[0].stat().st_ctime_ns == facts.st_ctime_ns


def test_what_was_just_used_or_is_in_a_store_stays(layout: Repository, tmp_path: Path) -> None:
    cache = Cache(limit=1500)
    first, second = (fetched(cache, layout, content) for content in (A, B))
    assert first.is_file()
    assert second.is_file()
    for path in (first, second):
        age(path)
    os.link(first, tmp_path / "in-a-store")
    assert cache.collect().removed == 0  # the other one is within the limit
    emptied = Cache(limit=0).collect()
    assert (emptied.removed, emptied.freed, first.is_file()) == (1, len(B), True)


def test_parts_of_downloads_go_when_they_are_old_and_nobody_works_at_them(
    layout: Repository,
) -> None:
    cache = Cache(limit=1 << 20)
    with cache.draft(descriptor_of(A, "text/plain")) as running:
        running.write_bytes(A[:10])
        given_up = cache.folder / "partial" / ("0" * 64)
        given_up.write_bytes(b"a part")
        for path in (running, given_up):
            age(path, STALE + 1)
        assert cache.collect().removed == 1
        assert (running.is_file(), given_up.is_file()) == (True, False)
        assert Cache(limit=0).collect().removed == 0
    assert running.is_file()  # for the next attempt
    assert Cache(limit=0).collect().removed == 1


def test_what_lies_beside_no_file_goes(layout: Repository) -> None:
    cache = Cache(limit=1 << 20)
    there, gone, coming = (
        cache.folder / f"{name}.wmatrix" for name in (fetched(cache, layout, A).stem, "b", "c")
    )
    for path in (there, gone, coming):
        for suffix in ("sig", "certificate.sig", "used"):
            path.with_name(f"{path.name}.{suffix}").write_bytes(b"")
    age(there)
    age(gone)
    assert cache.collect().removed == 0
    left = {path.name.partition(".")[0] for path in cache.folder.glob("*.wmatrix.*")}
    assert left == {there.stem, coming.stem}


def test_on_a_full_disk_what_was_not_used_for_the_longest_makes_room(
    layout: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(limit=1 << 20)
    old, new = (fetched(cache, layout, content) for content in (A, B))
    age(old, 3 * FRESH)
    age(new)
    room = 400
    write = Download.write

    def written(self: Download, chunk: bytes) -> None:
        """On a disk that has room for a part of it while the old file is there."""
        there = old.exists() * room
        write(self, chunk[: there or None])
        if there:
            raise storage_full(OSError(errno.ENOSPC, "No space left"), self.descriptor.size)

    monkeypatch.setattr(Download, "write", written)
    descriptor, counted = descriptor_of(C, "text/plain"), []
    path = cache.fetch(layout, descriptor, "c.wmatrix", progress=counted.append)
    assert path.read_bytes() == C
    assert (old.exists(), new.exists()) == (False, True)
    assert sum(counted) == len(C)


def test_on_a_full_disk_what_was_just_used_stays(
    layout: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(limit=1 << 20)
    just_used = fetched(cache, layout, A)

    def full(self: Download, chunk: bytes) -> None:
        raise storage_full(OSError(errno.EDQUOT, "Disk quota exceeded"), self.descriptor.size)

    monkeypatch.setattr(Download, "write", full)
    with pytest.raises(StorageFull, match="quota"):
        fetched(cache, layout, B)
    assert just_used.exists()


def test_too_large_for_the_cache(layout: Repository) -> None:
    with pytest.raises(StorageFull, match="larger than the cache"):
        fetched(Cache(limit=999), layout, A)


def test_a_pull_needs_no_cache_that_is_large_enough(
    make_package: Callable[..., Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWARENESS_CACHE_GIB", "0")
    repository = open_repository(tmp_path / "layout")
    listing, _ = push_file(publish(make_package(), tmp_path), repository)
    path = pull_file(repository, listing.id, tmp_path / "store")
    assert path.stat().st_size == listing.bytes
    assert not [file for file in (tmp_path / "home" / "cache").rglob("*") if file.is_file()]


def test_a_pulled_file_takes_no_room_twice_and_is_checked_when_it_is_taken_again(
    make_package: Callable[..., Package], tmp_path: Path, empty_home: Path
) -> None:
    repository = open_repository(tmp_path / "layout")
    listing, _ = push_file(publish(make_package(), tmp_path), repository)
    path = pull_file(repository, listing.id, tmp_path / "store")
    cached = empty_home / "cache" / path.name
    assert cached.samefile(path)
    content = path.read_bytes()
    path.unlink()
    cached.write_bytes(b"x" + content[1:])
    assert pull_file(repository, listing.id, tmp_path / "other").read_bytes() == content


def test_a_part_that_was_altered_is_copied_again(
    make_package: Callable[..., Package], tmp_path: Path, empty_home: Path
) -> None:
    """From a folder as from a registry: what is at fault is here."""
    repository = open_repository(tmp_path / "layout")
    listing, _ = push_file(publish(make_package(), tmp_path), repository)
    (empty_home / "cache" / "partial").mkdir(parents=True)
    (empty_home / "cache" / "partial" / listing.digest).write_bytes(b"not its beginning")
    assert pull_file(repository, listing.id, tmp_path / "store").stat().st_size == listing.bytes


@pytest.mark.parametrize("text", ["much", "-1", "nan", "1e30"])
def test_limits_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWARENESS_CACHE_GIB", text)
    with pytest.raises(BadInput, match="AWARENESS_CACHE_GIB"):
        default_limit()
