"""The server's registry: what it lists of a memory, and the folder into which it is pulled."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, BadInput, PackageTooLarge
from awareness_vllm.files import home, put_in_place, scratch_folder
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import Reference
from awareness_vllm.oci.repository import Progress, Repository, no_progress
from awareness_vllm.oci.transfer import Found, look
from awareness_vllm.packages.listing import PackageListing, listing_of
from awareness_vllm.packages.manifest import MAX_TOKEN_BYTES, layout_of
from awareness_vllm.packages.store import file_of, memory_not_found
from awareness_vllm.tensor_file import DTYPES, MAX_HEADER
from awareness_vllm.trust.policy import TrustPolicy

ITEM_BYTES = dict(DTYPES.values())


@dataclass(frozen=True)
class Offer:
    """A memory in a registry: its artefact, read as far as its listing."""

    found: Found
    listing: PackageListing


@dataclass(frozen=True)
class RegistryMemories:
    """The memories of a repository, and the cache of those that were pulled, which holds `limit`
    bytes of the files used last.

    Packages of more than `max_bytes` are refused; so are, if they must be `signed`, those that no
    key of the `trust` policy has signed.
    """

    repository: Repository
    cache: Path
    limit: int
    max_bytes: int
    trust: TrustPolicy
    signed: bool = False

    def look(self, memory: str) -> Offer:
        """What the registry has under a memory's ID: some kilobytes are read.

        Raises:
            MemoryNotFound, ArtefactCorrupt, RegistryError; PackageTooLarge: nobody could load it.
        """
        try:
            found = look(self.repository, memory)
        except ArtefactNotFound as error:
            raise memory_not_found(memory) from error
        listing = listing_of(found)
        if listing.id != memory:
            raise _not_what_it_says(memory, f"the package {listing.id}", "the package of this ID")
        check_bytes(listing)
        if listing.bytes > self.max_bytes:
            raise PackageTooLarge(
                f"memory {memory} is larger than this server loads",
                found=f"{listing.bytes / 2**30:.3g} GiB in the registry",
                expected=f"{self.max_bytes / 2**30:.3g} GiB at most",
                remedy="start the server with a larger --max-load-gib",
            )
        return Offer(found, listing)

    def pull(self, offer: Offer, progress: Progress = no_progress) -> None:
        """Put a memory into the cache, checked as every file of a stranger's is.

        Raises:
            ArtefactCorrupt, PackageCorrupt, SignatureInvalid, RegistryError
        """
        (layer,) = offer.found.manifest.layers
        path = self.cache / file_of(offer.listing.id)
        self.cache.mkdir(parents=True, exist_ok=True)
        with scratch_folder(self.cache) as scratch:
            draft = scratch / path.name
            self.repository.fetch(layer, draft, progress)
            offer.listing.check_file(draft)
            put_in_place(draft, path)


def registry_memories(
    where: str, *, limit: int, max_bytes: int, trust: TrustPolicy, signed: bool
) -> RegistryMemories:
    """The memories of a server's registry. Raises BadInput."""
    repository = open_repository(where)
    return RegistryMemories(repository, pulled_folder(where), limit, max_bytes, trust, signed)


def reference_of(where: str) -> Reference:
    """A server's registry: a repository as a whole. Raises BadInput."""
    reference = Reference.parse(where)
    if reference.name is not None:
        raise BadInput(
            "a server's registry is a whole repository",
            found=where,
            expected="a reference without a tag or a digest",
        )
    return reference


def pulled_folder(where: str) -> Path:
    """The cache of what was pulled from a registry. Each registry has its own: a server's tenants
    read everything in its registry, and nothing of another server's."""
    reference = Reference.parse(where)
    if reference.host is None:
        where = os.path.realpath(reference.repository)
    return home() / "cache" / "served" / hashlib.sha256(where.encode()).hexdigest()[:16]


def check_bytes(listing: PackageListing) -> None:
    """Check that a package of so many bytes can be the one of the manifest in its listing.

    Raises:
        ArtefactCorrupt
    """
    layout = layout_of(listing.manifest, 0)
    least = sum(ITEM_BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in layout.values())
    most = least + MAX_TOKEN_BYTES * listing.manifest.tokens + MAX_HEADER
    if not least <= listing.bytes <= most:
        expected = f"{least} to {most}, by its manifest"
        raise _not_what_it_says(listing.id, f"{listing.bytes} bytes", expected)


def _not_what_it_says(memory: str, found: str, expected: str) -> ArtefactCorrupt:
    return ArtefactCorrupt(
        f"the registry's artefact {memory} cannot be used",
        found=found,
        expected=expected,
        remedy="push the package again",
    )
