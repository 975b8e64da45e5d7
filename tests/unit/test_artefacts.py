"""Memories and W-Matrices pushed into a layout folder and into a registry, and pulled from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, BadInput, RegistryError
from awareness_vllm.marketplace.files import listing, pull_file, push_file
from awareness_vllm.marketplace.market import Marketplace
from awareness_vllm.oci import index_file
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.index_file import MAX_ENTRY, MAX_LAYOUT
from awareness_vllm.oci.reference import Reference
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.listing import WMatrixListing

DIGEST = "sha256:" + 64 * "0"


pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]


@pytest.fixture
def package_file(make_package: Callable[..., Package], tmp_path: Path) -> Path:
    return publish(make_package(), tmp_path / "author")


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("oci://localhost:5000/team/memories:v1", "localhost:5000", "team/memories", "v1", None),
        ("oci://ghcr.io/a/b", "ghcr.io", "a/b", None, None),
        (f"oci://ghcr.io/a/b:v1@{DIGEST}", "ghcr.io", "a/b", None, DIGEST),
        ("folder/a:v1", None, "folder/a", "v1", None),
        ("folder:x/a", None, "folder:x/a", None, None),
    ],
)
def test_references(
    text: str, host: str | None, repository: str, tag: str | None, digest: str | None
) -> None:
    assert Reference.parse(text) == Reference(host, repository, tag, digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "oci://",
        "oci://host",
        "oci://host/UPPER",
        "oci://ho st/a",
        "oci://h/a:b c",
        "http://h/a",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="reference"):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("http://h/a", "oci://h/a"),
        ("docker://ghcr.io/me/Notes:V1", "oci://ghcr.io/me/notes:V1"),
        ("oci://h:5000/a/", "oci://h:5000/a"),
        ("oci://h/UPPER", "oci://h/upper"),
        ("127.0.0.1:5000/team/memories", "oci://127.0.0.1:5000/team/memories"),
        ("ghcr.io/me/notes:v1", "oci://ghcr.io/me/notes:v1"),
        ("localhost/a", "oci://localhost/a"),
        ("folder/a:v1", None),
        ("../nosuch/a", None),
        ("./folder/a", None),
        ("oci://", None),
    ],
)
def test_a_registry_that_is_meant_is_named(
    text: str,
    meant: str | None,
    package_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: push_file(package_file, open_repository(text)),
        lambda: open_repository(text).manifest("v1"),
        lambda: list(open_repository(text).tagged()),
    ):
        with pytest.raises((BadInput, ArtefactNotFound)) as caught:
            use()
        expected = (
            () if meant is None else (f"write {meant}", f"write {meant} if a registry is meant")
        )
        assert caught.value.remedy in (expected or (None,))


def test_a_package_comes_back_as_it_was_pushed(
    package_file: Path, repository: Repository, tmp_path: Path
) -> None:
    pushed, descriptor = push_file(package_file, repository, tags=["notes"], license="CC0-1.0")
    for name in (pushed.id, "notes", descriptor.digest):
        assert listing(repository, name) == pushed
    pulled = pull_file(repository, "notes", tmp_path / "store")
    assert pulled.read_bytes() == package_file.read_bytes()
    assert pulled.stem == pushed.id == package_file.stem
    assert isinstance(pushed, PackageListing)
    assert pushed.token_count == pushed.manifest.tokens > 0


def test_a_map_comes_back_as_it_was_pushed(
    wmatrix: WMatrix, repository: Repository, tmp_path: Path
) -> None:
    wmatrix.save(tmp_path / "a.wmatrix")
    pushed, _ = push_file(tmp_path / "a.wmatrix", repository, name="a to b")
    assert isinstance(pushed, WMatrixListing)
    assert list(repository.tags()) == [pushed.tag]
    pulled = pull_file(repository, pushed.tag, tmp_path / "maps")
    assert pulled.name == "a-to-b.wmatrix"
    assert pulled.read_bytes() == (tmp_path / "a.wmatrix").read_bytes()


def test_other_bytes_in_the_layout_are_refused(package_file: Path, tmp_path: Path) -> None:
    repository = open_repository(tmp_path / "layout")
    pushed, _ = push_file(package_file, repository)
    blob = tmp_path / "layout" / "blobs" / "sha256" / pushed.digest
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtefactCorrupt, match="sha256"):
        pull_file(repository, pushed.id, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
def test_a_damaged_blob_is_written_again(package_file: Path, tmp_path: Path, which: str) -> None:
    """Its size says nothing: a crash or a bad disk leaves other bytes of the right size."""
    repository = open_repository(tmp_path / "layout")
    pushed, descriptor = push_file(package_file, repository)
    config = look(repository, pushed.id).manifest.config.hex
    names = {"layer": pushed.digest, "config": config, "manifest": descriptor.hex}
    blob = tmp_path / "layout" / "blobs" / "sha256" / names[which]
    content = blob.read_bytes()
    blob.write_bytes(content[:9] + bytes(len(content) - 9))
    with pytest.raises(ArtefactCorrupt):
        pull_file(repository, pushed.id, tmp_path / "store")
    push_file(package_file, repository)
    assert blob.read_bytes() == content
    whole = blob.stat().st_ino
    push_file(package_file, repository)
    assert blob.stat().st_ino == whole  # which stays
    assert pull_file(repository, pushed.id, tmp_path / "store").is_file()


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ArtefactNotFound):
        listing(open_repository(tmp_path / "nowhere"), "mem_" + 32 * "0")


def of_too_many_bytes(index: Path) -> None:
    os.truncate(index, MAX_LAYOUT + 1)


def a_pipe(index: Path) -> None:
    index.unlink()
    os.mkfifo(index)


def a_link(index: Path) -> None:
    index.symlink_to(index.rename(index.with_name("elsewhere")))


def with_a_long_entry(index: Path) -> None:
    document = json.loads(index.read_bytes())
    document["manifests"][0]["urls"] = ["x" * MAX_ENTRY]
    index.write_text(json.dumps(document))


def with_a_long_value(index: Path) -> None:
    index.write_text(f'{{"x": [{"[]," * MAX_ENTRY} 0], {index.read_text()[1:]}')


@pytest.mark.parametrize(
    "damage", [of_too_many_bytes, a_pipe, a_link, with_a_long_entry, with_a_long_value]
)
def test_an_index_that_nobody_should_read_is_refused(
    damage: Callable[[Path], None], package_file: Path, tmp_path: Path
) -> None:
    repository = open_repository(tmp_path / "layout")
    listing, descriptor = push_file(package_file, repository)
    damage(tmp_path / "layout" / "index.json")
    for use in (
        lambda: repository.manifest(listing.tag),
        lambda: list(repository.tags()),
        lambda: repository.referrers(descriptor.digest),
        lambda: push_file(package_file, repository),
    ):
        with pytest.raises(RegistryError, match="cannot be used as a layout"):
            use()


def test_a_full_layout_takes_no_more_and_stays_as_it_is(
    package_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, index = open_repository(tmp_path / "layout"), tmp_path / "layout" / "index.json"
    listing, _ = push_file(package_file, repository)
    before = index.read_bytes()
    monkeypatch.setattr(index_file, "MAX_LAYOUT", len(before) + 100)
    with pytest.raises(RegistryError, match="full"):
        push_file(package_file, repository, tags=["another"])
    assert index.read_bytes() == before
    assert repository.manifest(listing.tag)


def test_an_index_may_be_written_with_escapes(package_file: Path, tmp_path: Path) -> None:
    repository, index = open_repository(tmp_path / "layout"), tmp_path / "layout" / "index.json"
    push_file(package_file, repository, tags=["notes"])
    index.write_text(index.read_text().replace('"notes"', r'"\u006eotes"'))
    assert list(repository.tags("n")) == ["notes"]
    assert repository.manifest("notes")
    with pytest.raises(ArtefactNotFound):
        repository.manifest("other")


def test_the_folder_is_an_oci_image_layout(package_file: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    push_file(package_file, open_repository(layout))
    push_file(package_file, open_repository(layout), tags=["again"])
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    names = [m["annotations"]["org.opencontainers.image.ref.name"] for m in index["manifests"]]
    assert names == [package_file.stem, "again"]


@pytest.mark.parametrize("where", ["author", "localhost:5000/team", "author:x/tag"])
def test_no_layout_is_made_where_nobody_meant_one(
    package_file: Path, tmp_path: Path, where: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="layout"):
        push_file(package_file, open_repository(tmp_path / where))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("where", ["nowhere", "author"])
def test_a_search_of_what_is_no_layout_says_so(
    package_file: Path, tmp_path: Path, where: str
) -> None:
    with pytest.raises(ArtefactNotFound, match="no registry"):
        Marketplace(tmp_path / where).memories.search()
    assert Marketplace().memories.search() == []  # the default one is made by the first push


def test_a_tag_is_not_another_files_id(package_file: Path, repository: Repository) -> None:
    other = "mem_" + 32 * "0"
    with pytest.raises(BadInput, match=other):
        push_file(package_file, repository, tags=[other])
    assert list(repository.tags()) == []
    push_file(package_file, repository, tags=[package_file.stem])


def test_what_names_no_listing_is_refused(package_file: Path, tmp_path: Path) -> None:
    market = Marketplace(tmp_path / "layout")
    found = market.memories.publish(package_file)
    for wrong in (found, None, 7):
        with pytest.raises(BadInput, match=r"listing\.id"):
            market.memories.pull(wrong)  # type: ignore[arg-type]
    for tokens in ("4000", (1, 2, 3), -1, (3, 1)):
        with pytest.raises(BadInput, match="tokens"):
            market.memories.search(tokens=tokens)  # type: ignore[arg-type]
