"""The marketplace over a layout folder and over a registry: listings, and the search index."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from random_maps import random_map
from registry_server import Handler, RegistryServer, serving

from awareness_vllm import Marketplace, MemoryCompatibilityChecker
from awareness_vllm.errors import (
    ArtefactCorrupt,
    ArtefactNotFound,
    BadInput,
    NotAvailable,
    RegistryDenied,
    RegistryError,
)
from awareness_vllm.marketplace import database, index
from awareness_vllm.marketplace.index import ListingIndex, New
from awareness_vllm.oci.artefact import MANIFEST, REF_NAME
from awareness_vllm.oci.repository import Repository
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


@pytest.fixture
def url(repository: Repository, empty_home: Path) -> str:
    return str(repository.reference)


@pytest.fixture
def files(make_package: Callable[..., Package], wmatrix: WMatrix, tmp_path: Path) -> list[Path]:
    """Two memories of the tiny model, and a map that leads from it."""
    made = [publish(make_package(text), tmp_path / "author") for text in ("short", "a longer text")]
    wmatrix.save(tmp_path / "author" / "a.wmatrix")
    return [*made, tmp_path / "author" / "a.wmatrix"]


@pytest.fixture
def market(url: str, files: list[Path]) -> Marketplace:
    market = Marketplace(url)
    market.memories.publish(files[0], name="Grüße aus Köln", description="A letter", tags=["short"])
    market.memories.publish(files[1], name="Release notes", license="CC0-1.0")
    market.wmatrices.publish(files[2])
    return market


def test_a_listing_by_id_tag_and_digest(market: Marketplace, files: list[Path]) -> None:
    listing = market.memories.get(files[0].stem)
    assert market.memories.get("short") == listing
    assert (listing.name, listing.source_model, listing.token_count) == (
        "Grüße aus Köln",
        "tiny",
        5,
    )
    assert (listing.bytes, listing.license) == (files[0].stat().st_size, None)
    (found,) = market.wmatrices.search()
    assert (found.source_model, found.target_model, found.certificate) == ("tiny", "target", None)
    assert market.wmatrices.get(found.id) == found
    with pytest.raises(ArtefactCorrupt, match="another kind"):
        market.memories.get(found.id)
    with pytest.raises(ArtefactNotFound):
        market.memories.get("mem_xyz789")
    with pytest.raises(NotAvailable):
        market.vectors.get("vec_abc123")


def test_searches(market: Marketplace, files: list[Path]) -> None:
    def names(**wanted: object) -> list[str]:
        return [listing.name for listing in market.memories.search(**wanted)]

    both = ["Grüße aus Köln", "Release notes"]
    assert sorted(names()) == both
    for text in ("gruße", "KÖLN let", "letter", files[0].stem):
        assert names(text=text) == ["Grüße aus Köln"], text
    assert names(text='"release" OR') == names(text="NEAR(") == []
    assert sorted(names(source_model="TINY")) == both
    assert names(source_model="other") == []
    assert names(tokens=5) == ["Grüße aus Köln"]
    assert names(tokens=(6, 13)) == ["Release notes"]
    assert sorted(names(target_model="target")) == sorted(names(target_model="tiny")) == both
    assert names(target_model="nobody") == []
    assert names(text="notes", limit=1) == ["Release notes"]
    assert len(market.memories.search(limit=1)) == 1
    with pytest.raises(BadInput, match="tokens"):
        names(tokens=(5, 4))
    assert market.wmatrices.search(source_model="target") == []
    assert len(market.wmatrices.search(text="tiny", target_model="target")) == 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tags of which the index has read a manifest."""
    seen: list[str] = []
    look = ListingIndex._look

    def counted(self: ListingIndex, new: New) -> object:
        seen.append(new.tag)
        return look(self, new)

    monkeypatch.setattr(ListingIndex, "_look", counted)
    return seen


def test_only_what_is_new_is_read(
    market: Marketplace,
    make_package: Callable[..., Package],
    tmp_path: Path,
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(market.memories.search()) == 2
    assert len(set(reads)) >= 3
    reads.clear()
    path = publish(make_package("third"), tmp_path / "author")
    market.memories.publish(path)
    assert market.memories.search()[0].name == path.stem  # the newest first
    assert reads == [path.stem]
    market.memories.publish(path, name="renamed")
    monkeypatch.setattr(index, "STALE", 0.0)
    assert [m.name for m in market.memories.search(text=path.stem)] == ["renamed"]
    assert len(market.memories.search()) == 3


def test_a_moved_tag_is_noticed_at_once_where_all_are_asked_for(
    market: Marketplace, files: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(market.memories.search("short")) == 1
    market.memories.publish(files[0], name="Note", tags=["short"])
    monkeypatch.setattr(index, "BATCH", 1)
    assert [m.name for m in market.memories.search("short", refresh=True)] == ["Note"]
    assert market.memories.search("letter") == []
    reads.clear()
    assert len(market.memories.search()) == 2
    assert reads == []


def test_what_is_no_longer_tagged_is_no_longer_found(
    market: Marketplace, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert market.memories.search("short") == market.memories.search("letter")
    monkeypatch.setattr(index, "STALE", 0.0)
    market.memories.publish(files[0], name="Note", tags=["short"])  # moves both tags
    assert [m.name for m in market.memories.search()] == ["Note", "Release notes"]
    assert market.memories.search("letter") == []


def test_a_damaged_index_is_made_again(market: Marketplace, reads: list[str]) -> None:
    before = market.memories.search("notes")
    path = market.memories.index.path
    for damage in (b"no database", path.read_bytes()[:5000] + b"x" * 40_000):
        database.remove(path)
        path.write_bytes(damage)
        reads.clear()
        assert market.memories.search("notes") == before
        assert len(reads) >= 3


def test_an_index_of_another_version_is_filled_again(market: Marketplace) -> None:
    before = market.memories.search("notes")
    path = market.memories.index.path
    tables = (
        "CREATE TABLE tags (digest TEXT)",
        "CREATE VIRTUAL TABLE texts USING fts5 (name)",
        "CREATE VIEW configs AS SELECT digest FROM tags",
        """CREATE TABLE "an ""odd"" name" (id INTEGER PRIMARY KEY AUTOINCREMENT)""",
    )
    for version in (0, 7, database.VERSION):
        database.remove(path)
        with contextlib.closing(sqlite3.connect(path)) as other:
            for statement in (*tables, f"PRAGMA user_version = {version}"):
                other.execute(statement)
        for _ in range(2):
            assert market.memories.search("notes") == before, version
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("DELETE FROM listings")  # the same tables, by another version without any
        other.execute("PRAGMA user_version = 7")
    assert market.memories.search("notes") == before


def test_an_index_waits_for_who_makes_it(market: Marketplace) -> None:
    path = market.memories.index.path
    path.parent.mkdir(parents=True)
    options = {"isolation_level": None, "check_same_thread": False}
    with (
        contextlib.closing(sqlite3.connect(path, **options)) as other,
        contextlib.ExitStack() as made,
    ):
        made.enter_context(database._alone(path.parent))
        other.execute("BEGIN IMMEDIATE")
        made.callback(other.rollback)
        (timer := threading.Timer(0.2, made.close)).start()
        assert len(market.memories.search()) == 2
        timer.join()


def test_an_index_that_cannot_be_written_is_named(market: Marketplace) -> None:
    market.memories.index.path.mkdir(parents=True)
    with pytest.raises(RegistryError, match="AWARENESS_HOME"):
        market.memories.search()


@pytest.mark.parametrize("repository", ["layout"], indirect=True)
def test_what_cannot_be_used_is_passed_over(
    market: Marketplace, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    repository = market.memories.repository
    _, raw = repository.manifest("short")
    config = json.loads(raw)["config"]["digest"].removeprefix("sha256:")
    blob = Path(url) / "blobs" / "sha256" / config
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1])
    assert [m.name for m in market.memories.search()] == ["Release notes"]
    assert "1 artefacts" in caplog.text
    caplog.clear()
    assert [m.name for m in market.memories.search()] == ["Release notes"]
    assert "1 artefacts" in caplog.text
    blob.write_bytes(whole)  # the index stays as it is
    assert len(market.memories.search()) == 2
    assert [m.name for m in market.memories.search("short")] == ["Grüße aus Köln"]  # by its tag
    caplog.clear()
    assert len(market.memories.search()) == 2
    assert not caplog.text


@pytest.mark.parametrize("repository", ["layout"], indirect=True)
def test_what_is_not_ours_in_a_layout_s_index_hinders_nobody(
    market: Marketplace, url: str, files: list[Path], tmp_path: Path
) -> None:
    file = Path(url) / "index.json"
    whole = json.loads(file.read_bytes())
    gone = {"mediaType": MANIFEST, "digest": f"sha256:{'0' * 64}", "size": 9}
    file.write_text(json.dumps(whole | {"manifests": [gone, *whole["manifests"]]}))
    assert market.memories.pull(files[0].stem, tmp_path).is_file()
    named = gone | {"annotations": {REF_NAME: "\ud800"}}
    file.write_text(json.dumps(whole | {"manifests": [named, *whole["manifests"]]}))
    with pytest.raises(RegistryError, match="cannot be used as a layout"):
        market.memories.search()


def gatekeeper(upstream: str, kept: str) -> type[Handler]:
    """A registry that shows all of another one, but gives one blob to nobody."""

    class Gatekeeper(Handler):
        def do_GET(self) -> None:
            if self.path.endswith(kept):
                body, status, kind = b'{"errors": [{"code": "DENIED"}]}', 403, "application/json"
            else:
                request = urllib.request.Request(f"http://{upstream}{self.path}")
                request.add_header("Accept", self.headers.get("Accept", "*/*"))
                try:
                    answer = urllib.request.urlopen(request)
                except urllib.error.HTTPError as error:  # no referrers
                    answer = error
                with answer:
                    body, status = answer.read(), answer.status
                    kind = answer.headers["Content-Type"]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Gatekeeper


def test_a_listing_can_be_read_without_the_right_to_pull(
    registry: RegistryServer, files: list[Path], empty_home: Path
) -> None:
    Marketplace(registry.reference("closed/notes")).memories.publish(files[0], tags=["note"])
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    with serving(gatekeeper(registry.host, digest)) as server:
        market = Marketplace(f"oci://127.0.0.1:{server.server_port}/closed/notes", "a token")
        listing = market.memories.get("note")
        checker = MemoryCompatibilityChecker([files[2]])
        report = checker.check(memory_listing=listing, target_model="target")
        assert report.refusal is None
        with pytest.raises(RegistryDenied) as denied:
            market.memories.pull("note")
    assert denied.value.remedy
    assert not list((empty_home / "store").glob("*"))


def test_what_cannot_be_listed_is_refused(
    url: str, files: list[Path], wmatrix: WMatrix, tmp_path: Path
) -> None:
    market = Marketplace(url)
    for words in ({"name": "two\nlines"}, {"description": "x" * 3000}, {"tags": ["a b"]}):
        with pytest.raises(BadInput):
            market.memories.publish(files[0], **words)
    with pytest.raises(BadInput, match="kind"):
        market.memories.publish(files[2])
    layers = (wmatrix.manifest.target.layers[0],) * 800
    large = wmatrix.manifest.target.model_copy(update={"layers": layers})
    random_map(wmatrix.manifest.source, large, rank=1).save(tmp_path / "large.wmatrix")
    with pytest.raises(BadInput, match="too large"):
        market.wmatrices.publish(tmp_path / "large.wmatrix")
    assert list(market.memories.repository.tags()) == []
    with pytest.raises(BadInput, match="whole repository"):
        Marketplace(f"{url}:v1")
