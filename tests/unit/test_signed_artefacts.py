"""Signatures that travel with memories and W-Matrices, by a folder and by a registry."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pulls_server import relist, without_text

from awareness_vllm.cli.main import main
from awareness_vllm.errors import ArtefactCorrupt, SignatureInvalid
from awareness_vllm.marketplace.files import Pulled, pull, pull_file, push_file
from awareness_vllm.marketplace.signatures import push_signatures, signatures
from awareness_vllm.oci.artefact import INDEX, MANIFEST
from awareness_vllm.oci.cache import Cache
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.remote import Remote
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.serving.registry import RegistryMemories
from awareness_vllm.trust.policy import Signers, TrustPolicy, signature_path
from awareness_vllm.trust.signing import KeyPair, keygen
from awareness_vllm.wmatrix.file import WMatrix, load

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]

Keys = dict[str, KeyPair]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return {name: keygen(tmp_path / name) for name in ("alice", "bob")}


@pytest.fixture
def trust(keys: Keys, tmp_path: Path) -> TrustPolicy:
    """Alice is trusted with everything, nobody else with anything."""
    entry = {"public_key": "alice.pub", "roles": ["package", "wmatrix", "certificate"]}
    (tmp_path / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    return TrustPolicy.read(tmp_path / "trust.json")


@pytest.fixture
def memory(make_package: Callable[..., Package], tmp_path: Path) -> Path:
    return publish(make_package(), tmp_path / "author")


def signed(path: Path, key: KeyPair, *what: str) -> None:
    assert main(["sign", str(path), "--key", str(key.private), *what]) == 0


def alter_signature(path: Path) -> None:
    """Change a signature, and nothing else of its bundle."""
    file = signature_path(path, "package")
    bundle = json.loads(file.read_text())
    signature = bundle["dsseEnvelope"]["signatures"][0]
    raw = bytearray(base64.b64decode(signature["sig"]))
    raw[-1] ^= 1
    signature["sig"] = base64.b64encode(raw).decode()
    file.write_text(json.dumps(bundle))


def pulled_signed(repository: Repository, name: str, folder: Path, trust: TrustPolicy) -> Pulled:
    """What is pulled only where a trusted key has signed it."""
    found = look(repository, name)
    return pull(repository, found, folder, trust=trust, require_signed=True)


def test_a_signature_comes_with_its_memory(
    memory: Path,
    repository: Repository,
    keys: Keys,
    trust: TrustPolicy,
    tmp_path: Path,
) -> None:
    signed(memory, keys["alice"])
    listing, _ = push_file(memory, repository)
    pulled = pulled_signed(repository, listing.id, tmp_path / "s", trust)
    assert pulled.signers.package == "alice"
    there = signature_path(pulled.path, "package")
    assert there.read_bytes() == signature_path(memory, "package").read_bytes()
    # Without a trust file it comes too, for whoever has one later.
    assert signature_path(pull_file(repository, listing.id, tmp_path / "t"), "package").is_file()


def test_a_signature_outlives_another_description(
    memory: Path,
    repository: Repository,
    keys: Keys,
    trust: TrustPolicy,
    tmp_path: Path,
) -> None:
    signed(memory, keys["alice"])
    listing, first = push_file(memory, repository)
    signature_path(memory, "package").unlink()
    _, second = push_file(memory, repository, description="somebody else's words")
    assert first.digest != second.digest
    pulled = pulled_signed(repository, listing.id, tmp_path / "s", trust)
    assert pulled.signers.package == "alice"


def test_map_and_certificate_have_their_own(
    wmatrix: WMatrix,
    repository: Repository,
    keys: Keys,
    trust: TrustPolicy,
    tmp_path: Path,
) -> None:
    certificate = load(Path(__file__).parents[1] / "data/v0.1/pair.wmatrix").manifest.certificate
    manifest = wmatrix.manifest.model_copy(update={"certificate": certificate})
    path = tmp_path / "a.wmatrix"
    replace(wmatrix, manifest=manifest).save(path)
    signed(path, keys["bob"])
    signed(path, keys["alice"], "--certificate")
    listing, _ = push_file(path, repository)
    pulled = pull(repository, look(repository, listing.tag), tmp_path / "s", trust=trust)
    assert pulled.signers == Signers(certificate="alice")
    assert trust.signer(pulled.path, listing.digest, "wmatrix") is None
    assert signature_path(pulled.path, "wmatrix").is_file()


def test_what_nobody_trusted_has_signed_is_not_even_pulled(
    memory: Path,
    repository: Repository,
    keys: Keys,
    trust: TrustPolicy,
    tmp_path: Path,
) -> None:
    signed(memory, keys["bob"])
    listing, _ = push_file(memory, repository)
    found, brought = look(repository, listing.id), []
    with pytest.raises(SignatureInvalid, match="not signed by a trusted key"):
        pull(
            repository,
            found,
            tmp_path / "s",
            trust=trust,
            require_signed=True,
            progress=brought.append,
        )
    assert (brought, list((tmp_path / "s").iterdir())) == ([], [])
    assert pull(repository, found, tmp_path / "s", trust=trust).signers == Signers()


def test_of_several_signatures_the_trusted_one_counts(
    memory: Path,
    repository: Repository,
    keys: Keys,
    trust: TrustPolicy,
    tmp_path: Path,
) -> None:
    for name in ("bob", "alice", "bob"):
        signed(memory, keys[name])
        listing, descriptor = push_file(memory, repository)
    assert len(signatures(repository, descriptor.digest)) == 3
    found = look(repository, listing.id)
    assert pull(repository, found, tmp_path / "s", trust=trust).signers.package == "alice"
    # One that is altered is not believed, nor does it keep the good one away.
    signed(memory, keys["alice"])
    alter_signature(memory)
    push_signatures(repository, memory, listing, descriptor)
    assert len(signatures(repository, descriptor.digest)) == 4
    assert pull(repository, found, tmp_path / "t", trust=trust).signers.package == "alice"


def test_an_altered_signature_alone_is_refused(
    memory: Path, keys: Keys, trust: TrustPolicy, tmp_path: Path
) -> None:
    repository = open_repository(tmp_path / "layout")
    signed(memory, keys["alice"])
    alter_signature(memory)
    listing, _ = push_file(memory, repository)
    with pytest.raises(SignatureInvalid, match="cannot be trusted"):
        pull(repository, look(repository, listing.id), tmp_path / "s", trust=trust)
    assert list((tmp_path / "s").iterdir()) == []


def test_an_unreadable_signature_is_not_pushed(memory: Path, tmp_path: Path) -> None:
    signature_path(memory, "package").write_bytes(b"{}")
    repository = open_repository(tmp_path / "layout")
    with pytest.raises(SignatureInvalid):
        push_file(memory, repository)
    assert list(repository.tags()) == []


def files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*") if file.is_file()}


def test_a_server_s_failed_pull_leaves_nothing(
    memory: Path, keys: Keys, trust: TrustPolicy, tmp_path: Path
) -> None:
    repository, cache = open_repository(tmp_path / "layout"), Cache(tmp_path / "cache")
    registry = RegistryMemories(repository, cache, 1 << 30, trust)
    used = {memory.name, f"{memory.name}.used"}
    signed(memory, keys["alice"])
    listing, _ = push_file(memory, repository)
    blob = tmp_path / "layout" / "blobs" / "sha256" / listing.digest
    blob.write_bytes(bytes(listing.bytes))
    with pytest.raises(ArtefactCorrupt, match="sha256"):
        registry.pull(registry.look(memory.stem))
    assert files_in(cache.folder) == set()
    blob.write_bytes(memory.read_bytes())
    registry.pull(registry.look(memory.stem))
    assert files_in(cache.folder) == used | {f"{memory.name}.sig"}
    # A signature that came later joins a file that is there.
    signature_path(cache.folder / memory.name, "package").unlink()
    registry.pull(registry.look(memory.stem))
    assert files_in(cache.folder) == used | {f"{memory.name}.sig"}
    # All bytes come, and the listing is a lie: a download that nothing will make good.
    cache.remove(memory.name)
    relist(tmp_path / "layout", memory.stem, without_text)
    with pytest.raises(ArtefactCorrupt, match="not that of its file"):
        registry.pull(registry.look(memory.stem))
    assert files_in(cache.folder) == set()


def test_two_that_sign_at_once(
    memory: Path, registry: Any, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry has no referrers API. One pusher has read the index before the other one wrote
    it, and writes its own only when that one has looked again and found everything in order."""
    where = registry.reference("test/two-pushers")
    listing, descriptor = push_file(memory, open_repository(where))
    has_read, may_write, put = threading.Event(), threading.Event(), Remote._put

    def late(self: Remote, raw: bytes, media_type: str, name: str) -> Any:
        if media_type == INDEX and threading.current_thread().name == "slow":
            has_read.set()
            assert may_write.wait(10)
        return put(self, raw, media_type, name)

    monkeypatch.setattr(Remote, "_put", late)
    paths = [tmp / memory.name for name in keys if (tmp := memory.parent / name).mkdir() is None]
    for path, key in zip(paths, keys.values(), strict=True):
        path.hardlink_to(memory)
        signed(path, key)
    slow, fast = (
        threading.Thread(
            target=push_signatures,
            args=(open_repository(where), path, listing, descriptor),
            name=name,
        )
        for path, name in zip(paths, ("slow", "fast"), strict=True)
    )
    slow.start()
    assert has_read.wait(10)
    fast.start()
    fast.join(10)
    before = signatures(open_repository(where), descriptor.digest)
    may_write.set()
    slow.join(10)
    assert len(before) == 2  # the fast one has seen that the other one is on its way
    assert len(signatures(open_repository(where), descriptor.digest)) == 2
    # Tags of referrers are no tags of anybody's.
    assert list(open_repository(where).tags()) == [listing.tag]


def test_tags_that_a_stranger_made_up_keep_no_signature_away(
    memory: Path, registry: Any, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awareness_vllm.oci.remote.MOST_LOST", 2)
    repository = open_repository(registry.reference("test/made-up"))
    listing, descriptor = push_file(memory, repository)
    _, raw = repository.manifest(listing.tag)
    tags = (f"sha256-{descriptor.hex}.{i:016x}" for i in range(5))
    repository.put_manifest(raw, MANIFEST, *tags)
    signed(memory, keys["alice"])
    push_signatures(repository, memory, listing, descriptor)
    assert len(signatures(repository, descriptor.digest)) == 1
