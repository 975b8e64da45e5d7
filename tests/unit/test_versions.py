"""Versions of a name, whose tags nobody else's push moves, however long it stands still."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from memories_server import certificate_with

from awareness_vllm.errors import RegistryError
from awareness_vllm.files import file_digest
from awareness_vllm.marketplace.market import Marketplace
from awareness_vllm.oci.artefact import MANIFEST
from awareness_vllm.oci.repository import Repository
from awareness_vllm.wmatrix import versions
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.listing import artefact_of
from awareness_vllm.wmatrix.versions import push_version

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_pause", lambda: None)


@pytest.fixture
def files(wmatrix: WMatrix, tmp_path: Path) -> list[Path]:
    """Two maps between the same models."""
    paths = [tmp_path / f"{kept}.wmatrix" for kept in (0.7, 0.8)]
    for path in paths:
        certificate = certificate_with(float(path.stem))
        manifest = wmatrix.manifest.model_copy(update={"certificate": certificate})
        replace(wmatrix, manifest=manifest).save(path)
    return paths


class Stalled:
    """A repository that one pusher stands still before a request to."""

    def __init__(self, repository: Repository, before: int) -> None:
        self.repository, self.before, self.calls = repository, before, 0
        self.stands, self.goes_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.repository, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.calls == self.before:
                self.stands.set()
                assert self.goes_on.wait(30)
            self.calls += 1
            answer = found(*args, **kwargs)
            return answer if name != "tags" else iter(list(answer))

        return call


def test_a_stalled_push_moves_nobody_s_version(files: list[Path], repository: Repository) -> None:
    """Wherever it stands still while another one's push begins and ends."""
    whole = Stalled(repository, -1)
    push_version(files[0], "counted", cast(Repository, whole))
    market = Marketplace(str(repository.reference))
    for before in range(whole.calls):
        name, stalled = f"pair-{before}", Stalled(repository, before)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(push_version, files[0], name, cast(Repository, stalled))
            assert stalled.stands.wait(30)
            other = push_version(files[1], name, repository)
            promised = market.wmatrices.get(other).digest
            stalled.goes_on.set()
            taken = first.result(30)
        digests = list(map(file_digest, files))
        assert promised == digests[1]
        assert taken != other
        assert [market.wmatrices.get(tag).digest for tag in (taken, other)] == digests
        newest = max(taken, other)
        assert market.wmatrices.get(name).digest == market.wmatrices.get(newest).digest
        assert sorted(repository.tags(f"{name}.v")) == sorted((taken, other))


def test_many_that_push_at_once(wmatrix: WMatrix, repository: Repository, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.wmatrix" for i in range(6)]
    for i, path in enumerate(paths):
        manifest = wmatrix.manifest.model_copy(
            update={"certificate": certificate_with(0.5 + i / 20)}
        )
        replace(wmatrix, manifest=manifest).save(path)
    with ThreadPoolExecutor(len(paths)) as pool:
        taken = list(pool.map(lambda path: push_version(path, "pair", repository), paths))
    assert len(set(taken)) == len(paths)
    market = Marketplace(str(repository.reference))
    for path, version in zip(paths, taken, strict=True):
        assert market.wmatrices.get(version).digest == file_digest(path)
    newest = max(taken, key=lambda tag: int(tag.removeprefix("pair.v")))
    assert market.wmatrices.get("pair").digest == market.wmatrices.get(newest).digest


def test_one_who_claims_nothing_is_given_way(
    files: list[Path], repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older client, or a stranger, moves the tag as soon as it is written; or each of them."""
    push_version(files[1], "other", repository)
    other = artefact_of(files[1], name="other").document
    moves = 1

    def moved() -> None:
        nonlocal moves
        if moves:
            moves -= 1
            repository.put_manifest(
                other, MANIFEST, f"pair.v{versions._newest(repository, 'pair')[0]}"
            )

    monkeypatch.setattr(versions, "_pause", moved)
    assert push_version(files[0], "pair", repository) == "pair.v2"
    market = Marketplace(str(repository.reference))
    assert market.wmatrices.get("pair").digest == file_digest(files[0])
    repository.put_manifest(other, MANIFEST, "pair.v3")
    moves = 100
    with pytest.raises(RegistryError, match="the map itself is pushed, as") as error:
        push_version(files[0], "pair", repository)
    tag = str(error.value.remedy).rpartition(" ")[2]
    assert market.wmatrices.get(tag).digest == file_digest(files[0])


def test_a_version_that_came_meanwhile_stays(
    files: list[Path], repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older client's, which claims nothing, between the question for a number and its use."""
    push_version(files[1], "other", repository)
    other, newest = artefact_of(files[1], name="other").document, versions._newest

    def late(*args: Any) -> Any:
        answer = newest(*args)
        if not answer[0]:
            repository.put_manifest(other, MANIFEST, "pair.v1")
        return answer

    monkeypatch.setattr(versions, "_newest", late)
    assert push_version(files[0], "pair", repository) == "pair.v2"
    market = Marketplace(str(repository.reference))
    assert market.wmatrices.get("pair.v1").digest == file_digest(files[1])


def test_claims_of_any_number_are_not_believed(files: list[Path], repository: Repository) -> None:
    push_version(files[0], "pair", repository)
    document = artefact_of(files[0], name="pair").document
    claims = versions._Claims(repository, "pair", document)
    repository.put_manifest(document, MANIFEST, f"{claims.prefix}{'f' * 16}{'0' * 16}")
    assert push_version(files[1], "pair", repository) == "pair.v2"
