"""Signatures as artefacts: they refer to that of the file which they are about, and come with it.

Each is a bundle as `awareness sign` writes it, under the media type that Sigstore gives bundles. As
in a folder, a signature says nothing by being there: what counts is whose key made it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, SignatureInvalid
from awareness_vllm.oci.artefact import (
    EMPTY,
    EMPTY_BLOB,
    Artefact,
    Descriptor,
    Layer,
    descriptor_of,
)
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look, push
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.trust.bundle import MAX_BUNDLE, parse_bundle
from awareness_vllm.trust.policy import (
    Role,
    Signers,
    TrustPolicy,
    read_signature,
    signature_path,
)
from awareness_vllm.wmatrix.listing import Listing, WMatrixListing

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
ROLE = "vnd.awareness.role"
MOST = 64
"""Signatures of one artefact that are looked at."""


@dataclass(frozen=True)
class Signed:
    """A signature in a repository: the role that it was pushed for, and the bundle's bytes."""

    role: Role
    bundle: bytes
    descriptor: Descriptor


def roles_of(listing: Listing) -> tuple[Role, ...]:
    """What can be signed of a file."""
    return ("package",) if isinstance(listing, PackageListing) else ("wmatrix", "certificate")


def digest_for(listing: Listing, role: Role) -> str | None:
    """The sha256, in hex, of what a signature of this role is about; None where there is none."""
    if role != "certificate":
        return listing.digest
    assert isinstance(listing, WMatrixListing)
    statement = listing.manifest.certificate_statement
    return None if statement is None else hashlib.sha256(statement).hexdigest()


def signatures(repository: Repository, digest: str) -> list[Signed]:
    """The signatures of an artefact, by its manifest's digest, in the order in which they were
    pushed. What is no signature of ours is left out: anyone who may push can refer to anything.

    Raises:
        RegistryError
    """
    return list(_signatures(repository, digest))


def _signatures(repository: Repository, digest: str) -> Iterator[Signed]:
    ours = [d for d in repository.referrers(digest) if d.artifact_type == BUNDLE]
    for descriptor in ours[-MOST:]:
        try:
            found = look(repository, descriptor.digest)
        except ArtefactCorrupt:
            continue
        manifest, role = found.manifest, (found.manifest.annotations or {}).get(ROLE)
        subject = manifest.subject and manifest.subject.digest
        if role not in get_args(Role) or subject != digest or len(manifest.layers) != 1:
            continue
        try:
            bundle = repository.blob(manifest.layers[0], MAX_BUNDLE)
        except ArtefactCorrupt:
            continue
        yield Signed(cast(Role, role), bundle, descriptor)


def push_signatures(
    repository: Repository, path: Path, listing: Listing, subject: Descriptor
) -> list[Role]:
    """Push the signatures that lie beside a file; of which roles there were some.

    Raises:
        SignatureInvalid: one that cannot be read; RegistryError.
    """
    pushed: list[Role] = []
    for role in roles_of(listing):
        if (bundle := read_signature(path, role)) is None:
            continue
        parse_bundle(bundle, signature_path(path, role).name)
        _push(repository, bundle, role, subject)
        pushed.append(role)
    return pushed


def carry_signatures(repository: Repository, tag: str, subject: Descriptor) -> None:
    """Have the signatures of the artefact that a file's own tag names refer to the one that is to
    take its place, too: they are about the file, which is the same under another description.

    Raises:
        RegistryError
    """
    try:
        old, _ = repository.manifest(tag)
    except (ArtefactNotFound, ArtefactCorrupt):
        return
    if old.digest != subject.digest:
        for signed in signatures(repository, old.digest):
            _push(repository, signed.bundle, signed.role, subject)


def _push(repository: Repository, bundle: bytes, role: Role, subject: Descriptor) -> None:
    layer = Layer(bundle, descriptor_of(bundle, BUNDLE))
    push(repository, Artefact(BUNDLE, EMPTY, EMPTY_BLOB, [layer], {ROLE: role}, subject))


def choose(
    listing: Listing,
    found: Iterable[Signed],
    beside: Path,
    scratch: Path,
    trust: TrustPolicy,
) -> Signers:
    """The signature of each role that counts, as files in a scratch folder, named as they are to
    lie beside `beside`; and the names of the trusted keys that made them.

    With a trust file it is the first by a trusted key, without one the last that was pushed. The
    file's own signature, where one lies beside it already, comes before all others.

    Raises:
        SignatureInvalid: there are some, and none is good.
    """
    signers: dict[str, str | None] = {}
    found = list(found)
    for role in roles_of(listing):
        if (digest := digest_for(listing, role)) is None:
            continue
        candidates = [signed.bundle for signed in reversed(found) if signed.role == role]
        if (own := read_signature(beside, role)) is not None:
            candidates.insert(0, own)
        draft = scratch / beside.name
        signers[role] = _first(candidates, draft, digest, role, trust)
    return Signers(**signers)


def signers_of(listing: Listing, found: Sequence[Signed], trust: TrustPolicy) -> Signers:
    """The names of the trusted keys that signed what is listed; nothing of the file is needed.

    Raises:
        SignatureInvalid: as `choose` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        return choose(listing, found, Path(folder) / "listed", Path(folder), trust)


def _first(
    candidates: Sequence[bytes], draft: Path, digest: str, role: Role, trust: TrustPolicy
) -> str | None:
    """Whose the first good signature is, which is left beside the draft; None: nobody's who is
    trusted."""
    file, unknown, invalid = signature_path(draft, role), None, None
    for bundle in candidates:
        try:
            parse_bundle(bundle, file.name)
            file.write_bytes(bundle)
            if (signer := trust.signer(draft, digest, role)) is not None:
                return signer
        except SignatureInvalid as error:
            invalid = invalid or error
        else:
            unknown = unknown or bundle
    file.unlink(missing_ok=True)
    if unknown is not None:
        file.write_bytes(unknown)
    elif invalid is not None:
        raise invalid
    return None


def not_signed(listing: Listing, role: Role, found: Sequence[Signed]) -> SignatureInvalid:
    """The error about a file that no trusted key has signed."""
    return SignatureInvalid(
        f"{listing.name} is not signed by a trusted key",
        found=f"{len(found)} signatures in the registry",
        expected=f"one of a key with the role {role!r} in the trust file",
        remedy="have it signed (`awareness sign`) and pushed, or add the signer's key",
    )
