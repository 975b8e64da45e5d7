"""Signatures as artefacts: they refer to that of the file which they are about, and come with it.

Each is a bundle as `awareness sign` writes it, under the media type that Sigstore gives bundles. As
in a folder, a signature says nothing by being there: what counts is whose key made it.

Whoever may push can have any number refer to a file. So a signature is first looked for by its
name, a tag of the file's digest and the key; and of those that refer to the file, junk is passed
over, within a limit of reads and time.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from awareness_vllm.errors import (
    ArtefactCorrupt,
    ArtefactNotFound,
    RegistryError,
    SignatureInvalid,
)
from awareness_vllm.oci.artefact import (
    EMPTY,
    EMPTY_BLOB,
    Artefact,
    Descriptor,
    Layer,
    descriptor_of,
)
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import parsed, push
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

logger = logging.getLogger(__name__)
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
ROLE = "vnd.awareness.role"
KEY = "vnd.awareness.key"
"""Annotation of a signature: the fingerprint of the key that is said to have made it."""
MOST = 64
"""Signatures of one artefact that are looked at where no key is trusted, and of other keys."""
MOST_TRIED = 2048
"""Signatures of one artefact that are looked at for one by a trusted key: each is two requests."""
SECONDS = 20.0
"""Time for that: afterwards no further one is begun with."""


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


def name_of(digest: str, fingerprint: str) -> str:
    """The tag of a key's signature of what has this sha256, in hex. It says nothing of the listing:
    another one of the same file has the same signatures."""
    return f"sha256-{digest}.{fingerprint[:32]}"


def signatures(repository: Repository, digest: str) -> list[Signed]:
    """The signatures of an artefact, by its manifest's digest, in the order in which they were
    pushed, of more than MOST the last ones. What is no signature of ours is left out: anyone who
    may push can refer to anything.

    Raises:
        RegistryError
    """
    ours = repository.referrers(digest, BUNDLE)[-MOST:]
    return [signed for entry in ours if (signed := _read(repository, entry.digest, digest))]


def candidates(
    repository: Repository, digest: str, listing: Listing, trust: TrustPolicy
) -> Iterator[Signed]:
    """The signatures that may count for a listed file, by its manifest's digest, the most promising
    first: each is read when it is asked for.

    With a trust file, those are first that trusted keys' names lead to; then of those that refer to
    the file those that say a trusted key made them, those that say nothing, and the last MOST of
    others'. Without one they are the last that were pushed.

    Raises:
        RegistryError
    """
    if trust:
        yield from _named(repository, listing, trust)
    begin, read = time.monotonic(), set[tuple[str, str]]()
    ours = _ordered(repository.referrers(digest, BUNDLE), listing, trust)
    for tried, descriptor in enumerate(ours):
        if tried == MOST_TRIED or time.monotonic() - begin > SECONDS:
            logger.warning(
                "%d of %d signatures of %s are not looked at: have its signer push it again",
                len(ours) - tried,
                len(ours),
                digest,
            )
            return
        if signed := _read(repository, descriptor.digest, digest, read):
            yield signed


def _named(repository: Repository, listing: Listing, trust: TrustPolicy) -> Iterator[Signed]:
    for role in roles_of(listing):
        if (digest := digest_for(listing, role)) is None:
            continue
        for fingerprint, key in trust.keys.items():
            if role in key.roles and (
                signed := _read(repository, name_of(digest, fingerprint), None)
            ):
                yield signed


def _ordered(
    found: Sequence[Descriptor], listing: Listing, trust: TrustPolicy
) -> Sequence[Descriptor]:
    """Referrers in the order of `candidates`, by what they say of themselves."""
    roles = (None, *roles_of(listing))
    ours = [d for d in reversed(found) if (d.annotations or {}).get(ROLE) in roles]
    if not trust:
        return ours[:MOST]
    keys = [(d.annotations or {}).get(KEY) for d in ours]
    named = [d for d, key in zip(ours, keys, strict=True) if key in trust.keys]
    unnamed = [d for d, key in zip(ours, keys, strict=True) if key is None]
    others = [d for d, key in zip(ours, keys, strict=True) if key and key not in trust.keys]
    return [*named, *unnamed, *others[:MOST]]


def _read(
    repository: Repository,
    name: str,
    subject: str | None,
    read: set[tuple[str, str]] | None = None,
) -> Signed | None:
    """A signature by its manifest's tag or digest; None for what is none, or not of this subject,
    or one whose role and bundle were `read` before."""
    try:
        descriptor, raw = repository.manifest(name)
        manifest = parsed(descriptor, raw)
        role = (manifest.annotations or {}).get(ROLE)
        refers = subject is None or (manifest.subject and manifest.subject.digest) == subject
        if role not in get_args(Role) or not refers or len(manifest.layers) != 1:
            return None
        (layer,) = manifest.layers
        if read is not None and (role, layer.digest) in read:
            return None
        signed = Signed(cast(Role, role), repository.blob(layer, MAX_BUNDLE), descriptor)
    except (ArtefactCorrupt, ArtefactNotFound):
        return None
    if read is not None:
        read.add((signed.role, layer.digest))
    return signed


def push_signatures(
    repository: Repository, path: Path, listing: Listing, subject: Descriptor
) -> list[Role]:
    """Push the signatures that lie beside a file, each under its name; of which roles there were
    some.

    Raises:
        SignatureInvalid: one that cannot be read; RegistryError.
    """
    pushed: list[Role] = []
    for role in roles_of(listing):
        if (bundle := read_signature(path, role)) is None:
            continue
        parse_bundle(bundle, signature_path(path, role).name)
        _push(repository, bundle, role, subject, named=True)
        pushed.append(role)
    return pushed


def carry_signatures(repository: Repository, tag: str, subject: Descriptor) -> None:
    """Have the signatures of the artefact that a file's own tag names refer to the one that is to
    take its place, too: they are about the file, which is the same under another description. They
    take no names: nobody has verified them.

    Raises:
        RegistryError
    """
    try:
        old, _ = repository.manifest(tag)
    except (ArtefactNotFound, ArtefactCorrupt):
        return
    if old.digest == subject.digest:
        return
    for signed in signatures(repository, old.digest):
        try:
            _push(repository, signed.bundle, signed.role, subject)
        except SignatureInvalid:  # a stranger's junk stays where it is
            continue


def _push(
    repository: Repository, bundle: bytes, role: Role, subject: Descriptor, named: bool = False
) -> None:
    about = parse_bundle(bundle, "a signature")
    layer = Layer(bundle, descriptor_of(bundle, BUNDLE))
    notes = {ROLE: role, KEY: about.fingerprint}
    artefact = Artefact(BUNDLE, EMPTY, EMPTY_BLOB, [layer], notes, subject)
    if not named:
        push(repository, artefact)
        return
    name = name_of(about.digest, about.fingerprint)
    try:
        push(repository, artefact, (name,))
    except RegistryError as error:
        if _read(repository, name, None) is None:
            raise
        # Where tags never move, another signature by the key keeps the name.
        logger.warning("the signature %s stays as it is: %s", name, error)
        push(repository, artefact)


def choose(
    listing: Listing,
    found: Iterable[Signed],
    beside: Path,
    scratch: Path,
    trust: TrustPolicy,
) -> Signers:
    """The signature of each role that counts, as files in a scratch folder, named as they are to
    lie beside `beside`; and the names of the trusted keys that made them.

    With a trust file it is the first by a trusted key, without one the first that can be read; no
    more are asked for. The file's own signature, where one lies beside it already, comes before all
    others.

    Raises:
        SignatureInvalid: there are some, and none is good.
    """
    wanted = {
        role: _Choice(scratch / beside.name, digest, role, trust)
        for role in roles_of(listing)
        if (digest := digest_for(listing, role)) is not None
    }
    for role, choice in wanted.items():
        if (own := read_signature(beside, role)) is not None:
            choice.offer(own)
    more = iter(found)
    while not all(choice.done for choice in wanted.values()):
        if (signed := next(more, None)) is None:
            break
        if signed.role in wanted and not wanted[signed.role].done:
            wanted[signed.role].offer(signed.bundle)
    return Signers(**{role: choice.made() for role, choice in wanted.items()})


def signers_of(listing: Listing, found: Iterable[Signed], trust: TrustPolicy) -> Signers:
    """The names of the trusted keys that signed what is listed; nothing of the file is needed.

    Raises:
        SignatureInvalid: as `choose` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        return choose(listing, found, Path(folder) / "listed", Path(folder), trust)


@dataclass
class _Choice:
    """The choice among a file's signatures of one role: whose the first good one is, the first by a
    key that is not trusted, and what is wrong with the first that is not good."""

    path: Path
    digest: str
    role: Role
    trust: TrustPolicy
    signer: str | None = None
    unknown: bytes | None = None
    invalid: SignatureInvalid | None = None

    @property
    def done(self) -> bool:
        return (self.signer if self.trust else self.unknown) is not None

    @property
    def file(self) -> Path:
        return signature_path(self.path, self.role)

    def offer(self, bundle: bytes) -> None:
        try:
            parse_bundle(bundle, self.file.name)
            self.file.write_bytes(bundle)
            self.signer = self.trust.signer(self.path, self.digest, self.role)
        except SignatureInvalid as error:
            self.invalid = self.invalid or error
        else:
            self.unknown = self.unknown or bundle

    def made(self) -> str | None:
        """Whose the signature is that is left beside the draft; None: nobody's who is trusted."""
        if self.signer is not None:
            return self.signer
        self.file.unlink(missing_ok=True)
        if self.unknown is not None:
            self.file.write_bytes(self.unknown)
        elif self.invalid is not None:
            raise self.invalid
        return None


def not_signed(listing: Listing, role: Role) -> SignatureInvalid:
    """The error about a file that no trusted key has signed."""
    return SignatureInvalid(
        f"{listing.name} is not signed by a trusted key",
        found="no such signature among those in the registry",
        expected=f"one of a key with the role {role!r} in the trust file",
        remedy="have it signed (`awareness sign`) and pushed, or add the signer's key",
    )
