"""A good signature among many that a stranger with the right to push has put around it."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_registry import HostileRegistry, Request, hostile_registry
from registry_server import RegistryServer

from awareness_vllm.cli.main import main
from awareness_vllm.errors import RegistryError, SignatureInvalid
from awareness_vllm.marketplace import signatures as module
from awareness_vllm.marketplace.files import artefact_of, listing_in, pull, push_file
from awareness_vllm.marketplace.signatures import BUNDLE, KEY, ROLE, name_of
from awareness_vllm.oci.artefact import (
    EMPTY,
    EMPTY_BLOB,
    INDEX,
    MANIFEST,
    Artefact,
    Descriptor,
    ImageIndex,
    Layer,
    descriptor_of,
)
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.remote import Remote, referrers_tag
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look, push
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.trust.policy import TrustPolicy, signature_path
from awareness_vllm.trust.signing import KeyPair, keygen

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two count as many, and who writes an index does not wait for others."""
    monkeypatch.setattr(module, "MOST", 2)
    monkeypatch.setattr("awareness_vllm.oci.remote.random.uniform", lambda *_: 0)


@pytest.fixture
def alice(tmp_path: Path) -> KeyPair:
    return keygen(tmp_path / "alice")


@pytest.fixture
def trust(alice: KeyPair, tmp_path: Path) -> TrustPolicy:
    entry = {"public_key": "alice.pub", "roles": ["package"]}
    (tmp_path / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    return TrustPolicy.read(tmp_path / "trust.json")


@pytest.fixture
def memory(make_package: Callable[..., Package], alice: KeyPair, tmp_path: Path) -> Path:
    """A memory that Alice has signed."""
    path = publish(make_package(), tmp_path / "author")
    assert main(["sign", str(path), "--key", str(alice.private)]) == 0
    return path


@pytest.fixture
def who(trust: TrustPolicy, tmp_path: Path) -> Callable[[Repository, str], str | None]:
    """Who is found to have signed what a tag names, pulled only where somebody trusted has."""

    def signer(repository: Repository, name: str) -> str | None:
        folder = tmp_path / secrets.token_hex(4)
        found = look(repository, name)
        return pull(repository, found, folder, trust=trust, require_signed=True).signers.package

    return signer


def bundle_artefact(bundle: bytes, subject: Descriptor, **notes: str) -> Artefact:
    """A signature as its artefact, which says of itself what a stranger wants."""
    layer = Layer(bundle, descriptor_of(bundle, BUNDLE))
    annotations = {ROLE: "package", **notes}
    return Artefact(BUNDLE, EMPTY, EMPTY_BLOB, [layer], annotations, subject)


def junk(memory: Path, subject: Descriptor, **notes: str) -> Artefact:
    """A signature of the right file, said to be by the right key, which did not make it."""
    bundle = json.loads(signature_path(memory, "package").read_text())
    sig = base64.b64encode(secrets.token_bytes(70)).decode()
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = sig
    return bundle_artefact(json.dumps(bundle).encode(), subject, **notes)


def flood(repository: Repository, memory: Path, subject: Descriptor, **notes: str) -> None:
    for _ in range(5):
        push(repository, junk(memory, subject, **notes))


def read_manifests(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the manifests that are read from now on."""
    kind, names = type(repository), list[str]()
    manifest = kind.manifest

    def noted(self: Any, name: str) -> Any:
        names.append(name)
        return manifest(self, name)

    monkeypatch.setattr(kind, "manifest", noted)
    return names


def test_junk_hides_no_signature(
    memory: Path,
    repository: Repository,
    alice: KeyPair,
    who: Callable[..., str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However much of it there is: the signature has a name that leads to it alone."""
    listing, subject = push_file(memory, repository)
    flood(repository, memory, subject, **{KEY: alice.fingerprint})
    names = read_manifests(repository, monkeypatch)
    assert who(repository, listing.id) == "alice"
    assert names == [listing.id, name_of(listing.digest, alice.fingerprint)]
    assert list(repository.tags()) == [listing.id]
    assert [tagged.tag for tagged in repository.tagged()] == [listing.id]


def test_a_listing_without_signatures_takes_none_away(
    memory: Path, repository: Repository, who: Callable[..., str | None]
) -> None:
    """A stranger lists the same file anew, and moves its tag there."""
    listing, first = push_file(memory, repository)
    bare = artefact_of(memory, name="the same, of a stranger")
    second = push(repository, bare, (listing.id,))
    assert repository.manifest(listing.id)[0].digest == second.digest != first.digest
    assert who(repository, listing.id) == "alice"


def test_a_displaced_signature_is_found_behind_junk(
    memory: Path,
    repository: Repository,
    alice: KeyPair,
    who: Callable[..., str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever moves its name, too, has to write more junk than a pull reads."""
    listing, subject = push_file(memory, repository)
    flood(repository, memory, subject, **{KEY: alice.fingerprint})
    name = name_of(listing.digest, alice.fingerprint)
    push(repository, junk(memory, subject, **{KEY: alice.fingerprint}), (name,))
    internal = list(repository.tags("sha256-", internal=True))
    assert internal.count(name) == 1
    assert who(repository, listing.id) == "alice"
    monkeypatch.setattr(module, "MOST_TRIED", 3)
    with pytest.raises(SignatureInvalid):
        who(repository, listing.id)
    monkeypatch.setattr(module, "MOST_TRIED", 100)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    with pytest.raises(SignatureInvalid):
        who(repository, listing.id)
    push_file(memory, repository)  # and its signer takes the name back
    assert who(repository, listing.id) == "alice"


@pytest.mark.parametrize("said", ["nothing", "another key", "its role twice"])
def test_another_program_s_signature_is_found_behind_junk(
    said: str,
    memory: Path,
    repository: Repository,
    alice: KeyPair,
    who: Callable[..., str | None],
) -> None:
    """It has no name, and does not say whose it is; junk says nothing, that it is another key's, or
    has the good one's bytes under another role or size."""
    signature = signature_path(memory, "package")
    bundle = signature.read_bytes()
    good = artefact_of(memory)
    subject = descriptor_of(good.document, MANIFEST)
    push(repository, bundle_artefact(bundle, subject))
    if said == "its role twice":
        for role, size in (("wmatrix", 0), ("package", 1)):
            layer = descriptor_of(bundle, BUNDLE)
            layer = layer.model_copy(update={"size": layer.size + size})
            same = Artefact(
                BUNDLE, EMPTY, EMPTY_BLOB, [Layer(bundle, layer)], {ROLE: role}, subject
            )
            repository.put_manifest(same.document, MANIFEST)
    else:
        flood(repository, memory, subject, **({KEY: 64 * "0"} if said == "another key" else {}))
    push(repository, good, (listing_in(good).tag,))
    assert who(repository, listing_in(good).tag) == "alice"


@pytest.mark.parametrize("oddity", ["large", "gone", "no index", "odd entry"])
def test_one_odd_referrer_hides_no_other(
    oddity: str,
    memory: Path,
    registry: RegistryServer,
    who: Callable[..., str | None],
) -> None:
    repository = open_repository(registry.reference(f"test/{secrets.token_hex(4)}"))
    assert isinstance(repository, Remote)
    good = artefact_of(memory)
    subject, tag = descriptor_of(good.document, MANIFEST), listing_in(good).tag
    bundle = signature_path(memory, "package").read_bytes()
    first = push(repository, bundle_artefact(bundle, subject))
    push(repository, good, (tag,))
    notes = {"filler": "x" * (100 << 10)} if oddity == "large" else {}
    odd = junk(memory, subject, **notes)
    for layer in (odd.config_layer, *odd.layers):
        repository.upload(layer)
    entry = repository.put_manifest(odd.document, MANIFEST)
    if oddity == "gone":
        repository.session.request("DELETE", f"manifests/{entry.digest}", expect=(202,))
    listed = [
        descriptor.model_copy(update={"artifact_type": BUNDLE}).model_dump(
            by_alias=True, exclude_none=True
        )
        for descriptor in (first, entry)
    ]
    if oddity == "odd entry":
        listed[1]["artifactType"] = 3
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}
    if oddity == "no index":
        repository.put_manifest(good.document, MANIFEST, referrers_tag(subject.digest))
        assert repository.referrers(subject.digest) == []
        push(repository, bundle_artefact(bundle, subject))  # mends it
    elif oddity != "gone":
        raw = json.dumps(index).encode()
        repository.put_manifest(raw, INDEX, referrers_tag(subject.digest))
    assert who(repository, tag) == "alice"


@pytest.fixture
def listing_registry(memory: Path) -> Any:
    with hostile_registry(artefact_of(memory), memory.stem) as registry:
        yield registry


@pytest.mark.slow
@pytest.mark.parametrize("filters", [True, False])
def test_pages_of_referrers(
    filters: bool,
    memory: Path,
    listing_registry: HostileRegistry,
    trust: TrustPolicy,
    who: Callable[..., str | None],
) -> None:
    """By the API of a registry, the good one on the last of many pages, of which none is whole."""
    subject = descriptor_of(listing_registry.document, MANIFEST)
    bundle = signature_path(memory, "package").read_bytes()
    others = [junk(memory, subject) for _ in range(6)]
    signatures = [*others, bundle_artefact(bundle, subject)]
    manifests = {descriptor_of(s.document, MANIFEST).digest: s for s in signatures}
    for signature in signatures:
        layer = signature.layers[0]
        assert isinstance(layer.content, bytes)
        listing_registry.blobs[layer.descriptor.digest] = layer.content

    def page(request: Request) -> None:
        _, _, at = request.path.partition("last=")
        begin = int(at or 0)
        some = list(manifests.items())[begin : begin + 2]
        entries = [
            descriptor_of(s.document, MANIFEST).model_copy(update={"artifact_type": BUNDLE})
            for _, s in some
        ]
        foreign = descriptor_of(b"{}", MANIFEST).model_copy(update={"artifact_type": "a/b"})
        index = ImageIndex(manifests=[*entries, *([] if filters else [foreign])])
        more = begin + 2 < len(manifests)
        path = f"{request.path.partition('?')[0]}?last={begin + 2}"
        request.answer(
            index.model_dump_json(by_alias=True, exclude_none=True).encode(),
            Content_Type=INDEX,
            **({"Link": f'<{path}>; rel="next"'} if more else {}),
        )

    def manifest(request: Request) -> None:
        name = request.path.rpartition("/")[2]
        if name in manifests:
            request.answer(manifests[name].document, Content_Type=MANIFEST)
        else:
            request.as_it_should()

    listing_registry.odd |= {"/referrers/": page, "/manifests/": manifest}
    repository = open_repository(listing_registry.reference)
    found = repository.referrers(subject.digest, BUNDLE)
    assert [entry.digest for entry in found] == list(manifests)
    first = next(asked.path for asked in listing_registry.requests if "referrers" in asked.path)
    assert first.endswith("?artifactType=application%2Fvnd.dev.sigstore.bundle.v0.3%2Bjson")
    assert who(repository, memory.stem) == "alice"


@pytest.mark.slow
def test_a_list_of_referrers_without_end(
    listing_registry: HostileRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one of as many as are listed at most."""
    monkeypatch.setattr("awareness_vllm.oci.remote.MAX_REFERRERS", 150)
    listing_registry.odd["/referrers/"] = lambda request: request.answer(
        ImageIndex().model_dump_json(by_alias=True).encode(),
        Content_Type=INDEX,
        Link=f'<{request.path}>; rel="next"',
    )
    assert open_repository(listing_registry.reference).referrers("sha256:" + 64 * "0") == []
    assert len(listing_registry.requests) == 2


def test_where_tags_never_move(
    memory: Path,
    repository: Repository,
    alice: KeyPair,
    who: Callable[..., str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second signature by the same key is pushed without the name, and the first one has it."""
    kind = type(repository)
    put = kind.put_manifest

    def once(self: Any, raw: bytes, media_type: str, *tags: str) -> Descriptor:
        digest = descriptor_of(raw, media_type).digest
        for tag in (tag for tag in tags if tag in known and known[tag] != digest):
            raise RegistryError(f"{tag} is immutable")
        known.update(dict.fromkeys(tags, digest))
        return put(self, raw, media_type, *tags)

    known: dict[str, str] = {}
    monkeypatch.setattr(kind, "put_manifest", once)
    listing, subject = push_file(memory, repository)
    assert main(["sign", str(memory), "--key", str(alice.private)]) == 0
    push_file(memory, repository)
    assert len(repository.referrers(subject.digest, BUNDLE)) == 2
    name = name_of(listing.digest, alice.fingerprint)
    flood(repository, memory, subject)
    with pytest.raises(RegistryError, match="immutable"):
        push(repository, junk(memory, subject), (name,))
    monkeypatch.setattr(module, "MOST_TRIED", 0)
    assert who(repository, listing.id) == "alice"
