"""The server's registry: what it lists of a memory, and the folder into which it is pulled."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.errors import (
    ArtefactCorrupt,
    ArtefactNotFound,
    BadInput,
    PackageTooLarge,
    StorageFull,
)
from awareness_vllm.files import home, put_in_place, scratch_folder
from awareness_vllm.marketplace.files import find
from awareness_vllm.marketplace.signatures import candidates, choose, not_signed
from awareness_vllm.oci.cache import Cache
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import Reference
from awareness_vllm.oci.repository import Progress, Repository, no_progress
from awareness_vllm.oci.transfer import Found
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import MAX_TOKEN_BYTES, layout_of
from awareness_vllm.packages.origin import is_own
from awareness_vllm.packages.store import digest_in, file_of, memory_not_found
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.tensor_file import DTYPES, MAX_HEADER, FileRefused, digest_of
from awareness_vllm.trust.policy import TrustPolicy, signature_path

CONNECT_S = 10.0
ITEM_BYTES = dict(DTYPES.values())


@dataclass(frozen=True)
class Offer:
    """A memory in a registry: its artefact, read as far as its listing."""

    found: Found
    listing: PackageListing


@dataclass(frozen=True)
class RegistryMemories:
    """The memories of a repository, and the cache of those that were pulled.

    Packages of more than `max_bytes` are refused; so are, if they must be `signed`, those that no
    key of the `trust` policy has signed.
    """

    repository: Repository
    cache: Cache
    max_bytes: int
    trust: TrustPolicy
    signed: bool = False

    def look(self, memory: str) -> Offer:
        """What the registry has under a memory's ID: some kilobytes are read.

        Raises:
            MemoryNotFound, ArtefactCorrupt, RegistryError; PackageTooLarge: nobody could load it;
            StorageFull: the cache could never hold it.
        """
        try:
            found, listing = find(self.repository, memory)
        except ArtefactNotFound as error:
            raise memory_not_found(memory) from error
        assert isinstance(listing, PackageListing)  # the tag is its own ID
        check_bytes(listing)
        if listing.bytes > self.max_bytes:
            raise PackageTooLarge(
                f"memory {memory} is larger than this server loads",
                found=f"{listing.bytes / 2**30:.3g} GiB in the registry",
                expected=f"{self.max_bytes / 2**30:.3g} GiB at most",
                remedy="start the server with a larger --max-load-gib",
            )
        if listing.bytes > self.cache.limit:
            raise StorageFull(
                f"memory {memory} is larger than the cache of this server's registry",
                found=f"{listing.bytes / 2**30:.3g} GiB in the registry",
                expected=f"{self.cache.limit / 2**30:.3g} GiB at most",
                remedy="start the server with a larger --registry-cache-gib",
            )
        return Offer(found, listing)

    def pull(self, offer: Offer, progress: Progress = no_progress) -> None:
        """Put a memory into the cache, checked as every file of a stranger's is.

        Raises:
            ArtefactCorrupt, PackageCorrupt, SignatureInvalid, RegistryError; StorageFull: the cache
            or its disk has no room.
        """
        (layer,) = offer.found.manifest.layers
        listing = offer.listing
        try:
            with self._signature(offer) as put_signature:

                def check(draft: Path) -> None:
                    listing.check_file(draft)
                    put_signature()  # nobody sees the file without it, nor it without the file

                name = file_of(listing.id)
                self.cache.fetch(self.repository, layer, name, check=check, progress=progress)
                put_signature()  # of a file that was there
        except OSError as error:
            raise StorageFull(
                f"memory {listing.id} cannot be kept in the cache",
                found=error.strerror or type(error).__name__,
                expected=f"a disk with room for {listing.bytes} bytes that can be written to",
            ) from error

    @contextlib.contextmanager
    def _signature(self, offer: Offer) -> Iterator[Callable[[], None]]:
        """What puts the signature that counts, if any, beside the package, once that is there.
        Raises SignatureInvalid."""
        listing, path = offer.listing, self.cache.folder / file_of(offer.listing.id)
        if not self.trust:
            yield lambda: None
            return
        digest = offer.found.descriptor.digest
        found = candidates(self.repository, digest, listing, self.trust)
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(self.cache.folder) as scratch:
            signer = choose(listing, found, path, scratch, self.trust).package
            if self.signed and signer is None and not is_own(listing.digest):
                raise not_signed(listing, "package")
            draft = signature_path(scratch / path.name, "package")

            def put() -> None:
                if draft.is_file():
                    put_in_place(draft, signature_path(path, "package"))

            yield put

    def lacks_signature(self, memory: str) -> bool:
        """Whether a pulled memory must be signed, and came without a signature: there may be one in
        the registry by now. Raises InvalidMemoryId."""
        path = self.cache.folder / file_of(memory)
        return self.signed and not signature_path(path, "package").exists()

    def used(self, memory: str) -> None:
        """Say that a pulled memory is used: what was not for the longest leaves the cache first."""
        with contextlib.suppress(OSError):  # a full disk: it only counts as older than it is
            self.cache.used(file_of(memory))


def registry_memories(config: ServingConfig, trust: TrustPolicy) -> RegistryMemories | None:
    """The memories of a server's registry, if it has one. Raises BadInput."""
    if config.registry is None:
        return None
    cache = Cache(pulled_folder(config.registry), int(config.registry_cache_gib * 2**30))
    timeout = min(CONNECT_S, config.load_timeout), config.load_timeout
    repository = open_repository(config.registry, timeout=timeout)
    signed = config.signed == "all"
    return RegistryMemories(repository, cache, config.max_load_bytes, trust, signed)


def drop_damaged(path: Path) -> None:
    """Remove a file from a cache if its bytes are not those that its name says any more, so that it
    is pulled again."""
    with contextlib.suppress(FileRefused):
        if not digest_of(path).startswith(digest_in(path.stem)):
            Cache(path.parent).remove(path.name)


def absolute_registry(where: str) -> str:
    """A server's registry, a repository as a whole; the folder of a layout is made absolute.

    Raises:
        BadInput
    """
    reference = Reference.parse(os.path.expanduser(where))
    if reference.name is not None:
        raise BadInput(
            "a server's registry is a whole repository",
            found=where,
            expected="a reference without a tag or a digest",
        )
    return str(reference) if reference.host else os.path.realpath(reference.repository)


def pulled_folder(where: str) -> Path:
    """The cache of what was pulled from a server's registry. Each registry has its own: tenants
    read everything in their server's registry, and nothing of another one's."""
    return home() / "cache" / "served" / hashlib.sha256(where.encode()).hexdigest()[:16]


def check_bytes(listing: PackageListing) -> None:
    """Check that a package of so many bytes can be the one of the manifest in its listing.

    Raises:
        ArtefactCorrupt
    """
    layout = layout_of(listing.manifest, 0)
    least = sum(ITEM_BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in layout.values())
    most = least + MAX_TOKEN_BYTES * listing.manifest.rows + MAX_HEADER
    if not least <= listing.bytes <= most:
        expected = f"{least} to {most}, by its manifest"
        raise ArtefactCorrupt(
            f"the registry's artefact {listing.id} cannot be used",
            found=f"{listing.bytes} bytes",
            expected=expected,
            remedy="push the package again",
        )
