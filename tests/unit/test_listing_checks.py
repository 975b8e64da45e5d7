"""Checks of what is only listed: which maps a registry's listings lead to, and what that costs."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from registry_server import RegistryServer

from awareness_vllm import CompatibilityChecker, Marketplace, MemoryCompatibilityChecker
from awareness_vllm.cli.main import main
from awareness_vllm.errors import BadInput, RegistryError, SignatureInvalid
from awareness_vllm.files import file_digest
from awareness_vllm.marketplace.files import listing_in, push_file
from awareness_vllm.marketplace.maps import RepositoryMaps
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.artefact import MANIFEST, MAX_CONFIG, Descriptor
from awareness_vllm.oci.layout import Layout
from awareness_vllm.oci.reference import Reference
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import push
from awareness_vllm.packages.file import Package, build, publish
from awareness_vllm.packages.manifest import StoredLatent
from awareness_vllm.trust.policy import TrustPolicy
from awareness_vllm.trust.signing import keygen
from awareness_vllm.wmatrix import versions
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.listing import RETENTION, WMatrixListing, artefact_of
from awareness_vllm.wmatrix.manifest import read_manifest
from awareness_vllm.wmatrix.registry import Registry
from awareness_vllm.wmatrix.versions import push_version

pytestmark = pytest.mark.unit
MAPS = Path(__file__).parents[2] / "maps"
THERE, BACK = "smollm2-135m--gemma3-270m.wmatrix", "gemma3-270m--smollm2-135m.wmatrix"


@contextlib.contextmanager
def counting(host: str) -> Iterator[tuple[str, list[int]]]:
    """A way to a host that counts the bytes which come back; the address to use instead."""
    received: list[int] = []
    name, port = host.split(":")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def forward(source: socket.socket, sink: socket.socket, counts: bool) -> None:
            with contextlib.suppress(OSError), source, sink:
                while chunk := source.recv(1 << 16):
                    if counts:
                        received.append(len(chunk))
                    sink.sendall(chunk)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    upstream = socket.create_connection((name, int(port)))
                    for ends in ((client, upstream, False), (upstream, client, True)):
                        threading.Thread(target=forward, args=ends, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", received
        server.shutdown(socket.SHUT_RDWR)


def memory_of(geometry: Geometry, tokens: int = 40) -> Package:
    """A memory of a model, with states that mean nothing."""
    states = [torch.zeros(tokens, g.heads, g.head_dim).bfloat16() for g in geometry.layers]
    ends = np.arange(1, tokens + 1, dtype=np.int64)
    return build(
        geometry=geometry,
        text="x" * tokens,
        tokens=[1] * tokens,
        spans=np.stack((ends - 1, ends), axis=1),
        keys=states,
        values=[state.clone() for state in states],
        engine="transformers",
        versions={"torch": "0"},
    )


def test_a_check_of_a_listing_costs_64_kib(
    registry: RegistryServer, tmp_path: Path, empty_home: Path
) -> None:
    """The shipped map and a memory of its source, all that comes over the wire."""
    offered = Marketplace(registry.reference("checks/shipped"))
    path = publish(memory_of(read_manifest(MAPS / THERE).source), tmp_path / "author")
    offered.memories.publish(path, tags=["note"])
    offered.wmatrices.publish(MAPS / THERE)
    with counting(registry.host) as (host, received):
        url = f"oci://{host}/checks/shipped"
        listing = Marketplace(url).memories.get("note")
        got = sum(received)
        # The map back names both models, and leads nowhere that is asked for.
        checker = MemoryCompatibilityChecker([MAPS / BACK], registry=url)
        report = checker.check(memory_listing=listing, target_model="gemma3-270m")
    assert (report.basis, report.refusal) != (None, None)
    assert report.basis is not None
    assert report.basis.kind == "claimed"
    assert report.basis.source.endswith("not pulled)")
    certificate = read_manifest(MAPS / THERE).measured
    assert certificate is not None
    assert report.estimated_retention == pytest.approx(certificate.retention.mean, abs=0.1)
    assert 0 < got < 10_000
    assert sum(received) <= MAX_CONFIG
    assert not (empty_home / "wmatrices").exists()


@pytest.fixture
def certified(wmatrix: WMatrix) -> Callable[[float], WMatrix]:
    """Maps of one pair that keep as much as they are told."""
    document = read_manifest(MAPS / THERE).model_dump(mode="json")["certificate"]

    def make(kept: float) -> WMatrix:
        figures = {"mean": kept, "ci_low": kept - 0.01, "ci_high": kept + 0.01}
        update = {"certificate": {**document, "retention": figures}}
        manifest = wmatrix.manifest.model_copy(update=update)
        return replace(wmatrix, manifest=manifest, bias=wmatrix.bias + kept)

    return make


def push_map(repository: Repository, wmatrix: WMatrix, path: Path) -> str:
    wmatrix.save(path)
    return push_file(path, repository)[0].digest


def test_the_best_certified_map_is_found(
    repository: Repository,
    certified: Callable[[float], WMatrix],
    wmatrix: WMatrix,
    tmp_path: Path,
    empty_home: Path,
) -> None:
    source, target = wmatrix.manifest.source, wmatrix.manifest.target
    maps = RepositoryMaps(repository)
    more = Registry((), maps)
    assert maps.find(source, target, has_text=True) is None
    push_map(repository, wmatrix, tmp_path / "plain.wmatrix")
    plain = more.find(source, target, has_text=True)
    assert (plain.listed, plain.certificate) == (True, None)
    digests = {
        kept: push_map(repository, certified(kept), tmp_path / f"{kept}.wmatrix")
        for kept in (0.7, 0.9, 0.8)
    }
    entry = more.find(source, target, has_text=True)
    assert entry.digest == digests[0.9]
    assert maps.find(target, source, has_text=True) is None
    assert maps.find(source, target, has_text=False) is None
    latent = StoredLatent(
        package=f"mem_{32 * '0'}",
        wmatrix=load(tmp_path / "0.7.wmatrix").tensors_digest,
        target=target,
        tokens=9,
        rank=wmatrix.manifest.rank,
        dtype="bfloat16",
    )
    by_tensors = maps.find(source, target, True, latent)
    assert by_tensors is not None
    assert by_tensors.digest == digests[0.7]
    assert [m.digest for m in maps.to(target)][:3] == [digests[k] for k in (0.9, 0.8, 0.7)]
    pulled = Registry((), RepositoryMaps(repository, pull=True)).find(source, target, True)
    assert (pulled.listed, pulled.path.parent) == (False, empty_home / "wmatrices")
    assert pulled.digest == digests[0.9]
    local = Registry.read([tmp_path / "plain.wmatrix"], more=maps)
    assert local.find(source, target, has_text=True).path == tmp_path / "plain.wmatrix"


def test_what_is_said_outside_a_certificate_decides_nothing(
    repository: Repository,
    certified: Callable[[float], WMatrix],
    wmatrix: WMatrix,
    tmp_path: Path,
    empty_home: Path,
) -> None:
    good = push_map(repository, certified(0.8), tmp_path / "good.wmatrix")
    for i, claim in enumerate(("9.9", "inf", "nan", "much")):
        certified(0.5 + i / 100).save(tmp_path / "bad.wmatrix")
        artefact = artefact_of(tmp_path / "bad.wmatrix")
        tag = WMatrixListing.model_validate_json(artefact.config).tag
        push(repository, replace(artefact, annotations={RETENTION: claim}), [tag])
    entry = RepositoryMaps(repository).find(wmatrix.manifest.source, wmatrix.manifest.target, True)
    assert entry is not None
    assert entry.digest == good


def test_where_there_is_a_trust_file_signatures_go_first(
    repository: Repository,
    certified: Callable[[float], WMatrix],
    wmatrix: WMatrix,
    tmp_path: Path,
    empty_home: Path,
) -> None:
    ends = wmatrix.manifest.source, wmatrix.manifest.target
    key = keygen(tmp_path / "alice")
    entry = {"public_key": "alice.pub", "roles": ["wmatrix", "certificate"]}
    (tmp_path / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    trust = TrustPolicy.read(tmp_path / "trust.json")
    push_map(repository, certified(0.97), tmp_path / "unsigned.wmatrix")
    listed = RepositoryMaps(repository, trust).find(*ends, True)
    assert listed is not None
    assert (listed.claimed, listed.signed_by) == (True, None)
    with pytest.raises(SignatureInvalid):
        RepositoryMaps(repository, trust, pull=True).find(*ends, True)
    for kept, signed in ((0.95, [["--certificate"]]), (0.9, [[]]), (0.7, [[], ["--certificate"]])):
        path = tmp_path / f"{kept}.wmatrix"
        certified(kept).save(path)
        for what in signed:
            assert main(["sign", str(path), "--key", str(key.private), *what]) == 0
        push_file(path, repository)
    for pull in (False, True):
        found = RepositoryMaps(repository, trust, pull).find(*ends, True)
        assert found is not None
        assert (found.signed_by, found.certificate_signed_by) == ("alice", "alice")
        assert not found.claimed


def test_a_stranger_s_tags_cost_a_lookup_no_more_than_so_many_requests(
    certified: Callable[[float], WMatrix],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    empty_home: Path,
) -> None:
    monkeypatch.setattr("awareness_vllm.marketplace.maps.MOST_OF_A_PAIR", 4)
    asked: list[str] = []

    class Counted(Layout):
        def manifest(self, name: str) -> tuple[Descriptor, bytes]:
            asked.append(name)
            return super().manifest(name)

    repository = Counted(Reference.parse(tmp_path / "layout"))
    best = push_map(repository, certified(0.9), tmp_path / "best.wmatrix")
    push_map(repository, certified(0.5), tmp_path / "other.wmatrix")
    manifest = certified(0.5).manifest
    maps, ends = RepositoryMaps(repository), (manifest.source, manifest.target)
    tag = listing_in(artefact_of(tmp_path / "other.wmatrix")).tag
    _, other = repository.manifest(tag)

    def found() -> str:
        entry = maps.find(*ends, True)
        assert entry is not None
        return entry.digest

    repository.put_manifest(other, MANIFEST, *(f"{tag[:-1]}{i}" for i in "gh"))  # four in all
    assert found() == best
    assert not caplog.text
    # Whatever order they can be first in, a stranger's are not the only ones that are looked at.
    repository.put_manifest(other, MANIFEST, *(f"{tag.partition('.')[0]}.0{i}" for i in "abcd"))
    push_map(repository, certified(0.9), tmp_path / "best.wmatrix")
    assert best[:16] in list(repository.tags(tag.partition(".")[0]))[-1]
    asked.clear()
    digests = {found() for _ in range(40)}
    assert best in digests
    assert len(asked) <= 40 * (4 + 4)  # each candidate's tag, and its digest
    assert "4 of 8 maps" in caplog.text


def test_a_registry_that_cannot_be_asked_is_no_verdict(tmp_path: Path, empty_home: Path) -> None:
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout" / "index.json").write_text("{")
    other = MAPS / BACK
    checker = MemoryCompatibilityChecker([other], registry=tmp_path / "layout")
    memory = memory_of(read_manifest(MAPS / THERE).source)
    with pytest.raises(RegistryError, match="layout"):
        checker.check(package=memory, target_model="gemma3-270m")


def test_estimates_of_listings(
    repository: Repository,
    certified: Callable[[float], WMatrix],
    make_package: Callable[..., Package],
    tmp_path: Path,
    empty_home: Path,
) -> None:
    push_map(repository, certified(0.85), tmp_path / "a.wmatrix")
    market = Marketplace(str(repository.reference))
    (wmatrix,) = market.wmatrices.search()
    checker = CompatibilityChecker()
    for target in (None, "target"):
        estimate = checker.estimate(wmatrix, target)
        assert (estimate.source, estimate.target, estimate.retention) == ("tiny", "target", 0.85)
        assert estimate.basis is not None
        assert estimate.basis.kind == "claimed"
    with pytest.raises(BadInput, match="leads"):
        checker.estimate(wmatrix, "gpt-4")
    memory = market.memories.publish(publish(make_package(), tmp_path / "author"))
    local = CompatibilityChecker([tmp_path / "a.wmatrix"])
    estimate = local.estimate(memory, "target")
    assert (estimate.retention, estimate.basis and estimate.basis.kind) == (0.85, "measured")
    assert local.estimate(memory, "tiny").retention == 1


def test_a_registered_map_is_the_newest_version_of_its_name(
    repository: Repository, certified: Callable[[float], WMatrix], empty_home: Path
) -> None:
    registry = str(repository.reference)
    market = Marketplace(registry)
    digests = []
    for kept, version in ((0.7, "pair.v1"), (0.7, "pair.v1"), (0.8, "pair.v2")):
        path = certified(kept).register("pair", registry)
        digests.append(market.wmatrices.get(version).digest)
        assert file_digest(path) == digests[-1] == market.wmatrices.get("pair").digest
    assert sorted(repository.tags("pair.")) == ["pair.v1", "pair.v2"]
    assert market.wmatrices.get("pair.v1").digest == digests[0] != digests[2]
    with pytest.raises(BadInput, match="reference"):
        certified(0.6).register("other", "http://nowhere")
    assert not (empty_home / "wmatrices" / "other.wmatrix").exists()


def test_two_that_register_one_name_at_once(
    repository: Repository,
    certified: Callable[[float], WMatrix],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    empty_home: Path,
) -> None:
    """Both have asked for the newest version before either has pushed one, and look again when both
    have."""
    together, seen = threading.Barrier(2, timeout=10), threading.local()
    newest = versions._newest

    def first(what: str) -> None:
        if what not in seen.__dict__:
            seen.__dict__[what] = True
            together.wait()

    def asked(*args: Any) -> Any:
        answer = newest(*args)
        first("asked")
        return answer

    monkeypatch.setattr(versions, "_newest", asked)
    monkeypatch.setattr(versions, "_pause", lambda: first("pushed"))
    paths = [tmp_path / f"{kept}.wmatrix" for kept in (0.7, 0.8)]
    for path in paths:
        certified(float(path.stem)).save(path)
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(lambda path: push_version(path, "pair", repository), paths))
    assert sorted(taken) == ["pair.v1", "pair.v2"]
    market = Marketplace(str(repository.reference))
    for path, version in zip(paths, taken, strict=True):
        assert market.wmatrices.get(version).digest == file_digest(path)
    assert market.wmatrices.get("pair").digest == market.wmatrices.get("pair.v2").digest
