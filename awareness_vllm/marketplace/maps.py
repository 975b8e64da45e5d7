"""The W-Matrices of a repository as a source of maps: the best certified one for two models."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, SignatureInvalid, escaped
from awareness_vllm.files import wmatrices_dir
from awareness_vllm.marketplace.files import file_name, pull
from awareness_vllm.marketplace.index import WORKERS, ListingIndex, Wanted
from awareness_vllm.marketplace.signatures import candidates, signers_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.artefact import ImageManifest
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import default_registry
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look, parsed
from awareness_vllm.packages.manifest import StoredLatent
from awareness_vllm.trust.policy import Signers, TrustPolicy
from awareness_vllm.wmatrix.listing import RETENTION, WMatrixListing, listing_of, pair_of
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

logger = logging.getLogger(__name__)
MOST_MAPS = 10_000
NO_SIGNERS = Signers()
MOST_OF_A_PAIR = 256
"""Maps between two models that a lookup asks about: each costs the registry a request, and whoever
may push can tag any number."""
Standing = tuple[bool, bool, float]
"""What a map is chosen by: whether it is signed as it must be, whether its certificate decides
anything, and the retention."""


@dataclass(frozen=True)
class RepositoryMaps:
    """The maps in a repository, found by the fingerprints of both models.

    The best is the one whose certificate has the highest retention of the map alone. Where there is
    a trust policy, maps that its keys signed go before others, and a certificate that none of them
    signed decides nothing. A map without certificate is found where there is no other.

    Without `pull`, entries are `listed`: manifests and config blobs alone are read, as a check
    needs. With it the file is pulled into `$AWARENESS_HOME/wmatrices` and read like any other,
    where there is a trust policy only if one of its keys signed it.
    """

    repository: Repository
    trust: TrustPolicy = field(default_factory=TrustPolicy)
    pull: bool = False

    def find(
        self, source: Geometry, target: Geometry, has_text: bool, latent: StoredLatent | None = None
    ) -> WMatrixEntry | None:
        """The best map between two models, or the one that made a `latent`.

        Raises:
            RegistryError; WMatrixCorrupt, SignatureInvalid: of what was pulled.
        """
        best: tuple[Standing, str, WMatrixEntry] | None = None
        for claim, digest in sorted(self._candidates(source, target), reverse=True):
            # No certificate is believed to be better than it says outside.
            if best is not None and best[0] >= (True, True, claim):
                break
            entry = self._listed(digest)
            if entry is None or entry.manifest.reads_tokens != has_text:
                continue
            if not entry.leads(source, target):
                continue
            if latent is not None and not entry.made(latent):
                continue
            standing = self._standing(entry)
            if best is None or standing > best[0]:
                best = standing, digest, entry
        if best is None:
            return None
        return self._pulled(best[1]) if self.pull else best[2]

    def to(self, target: Geometry) -> list[WMatrixListing]:
        """The maps that read text and lead to a model, the best first as far as no signatures
        decide. Raises RegistryError."""
        return self._found(Wanted("wmatrix", target=target.fingerprint, readable=True))

    def all(self) -> list[WMatrixListing]:
        """All maps, the best first, as of `to`. Raises RegistryError."""
        return self._found(Wanted("wmatrix"))

    def entries(self) -> list[WMatrixEntry]:
        """The entries of all maps, the best first; where there is a trust policy, with which of its
        keys signed them. A map whose signatures are not good is signed by nobody. Raises
        RegistryError."""
        maps = self.all()
        if not self.trust:
            return [entry_of(listing) for listing in maps]
        if self.repository.reference.host is None:
            signers = list(map(self._signers, maps))
        else:
            with ThreadPoolExecutor(WORKERS) as pool:  # each within this thread's deadline
                looks = [pool.submit(copy_context().run, self._signers, one) for one in maps]
                signers = [look.result() for look in looks]
        return sorted(map(entry_of, maps, signers), key=self._standing, reverse=True)

    def _signers(self, listing: WMatrixListing) -> Signers:
        """Whose signatures a listed map has."""
        try:
            return self._signed(listing, self.repository.manifest(listing.tag)[0].digest)
        except (ArtefactCorrupt, ArtefactNotFound, SignatureInvalid) as error:
            logger.warning("signed by nobody: %s: %s", escaped(listing.name), error)
            return NO_SIGNERS

    def _signed(self, listing: WMatrixListing, digest: str) -> Signers:
        """Whose signatures an artefact, of this manifest's digest, has. Raises SignatureInvalid."""
        found = candidates(self.repository, digest, listing, self.trust)
        return signers_of(listing, found, self.trust)

    def _found(self, wanted: Wanted) -> list[WMatrixListing]:
        found = ListingIndex(self.repository).search(wanted, MOST_MAPS)
        maps = [listing for listing in found if isinstance(listing, WMatrixListing)]
        return sorted(maps, key=lambda listing: self._standing(entry_of(listing)), reverse=True)

    def _candidates(self, source: Geometry, target: Geometry) -> Iterator[tuple[float, str]]:
        """What is said of the retention of each map between two models, and its manifest's
        digest. Of too many, some are drawn: tags say nothing of a map but its digest, and any fixed
        order of digests is one that a stranger can be first in."""
        tags = list(self.repository.tags(f"{pair_of(source, target)}."))
        if len(tags) > MOST_OF_A_PAIR:
            logger.warning(
                "%d of %d maps from %s to %s are not looked at: name the one you want by its tag",
                len(tags) - MOST_OF_A_PAIR,
                len(tags),
                escaped(source.name),
                escaped(target.name),
            )
            tags = random.sample(tags, MOST_OF_A_PAIR)
        for tag in tags:
            try:
                descriptor, raw = self.repository.manifest(tag)
                yield claimed_retention(parsed(descriptor, raw)), descriptor.digest
            except (ArtefactCorrupt, ArtefactNotFound) as error:
                logger.warning("skipped %s: %s", escaped(tag), error)

    def _listed(self, digest: str) -> WMatrixEntry | None:
        """The entry of an artefact; None where it cannot be used."""
        try:
            listing = listing_of(look(self.repository, digest))
            signers = self._signed(listing, digest) if self.trust else NO_SIGNERS
        except (ArtefactCorrupt, ArtefactNotFound, SignatureInvalid) as error:
            logger.warning("skipped %s: %s", digest, error)
            return None
        return entry_of(listing, signers)

    def _standing(self, entry: WMatrixEntry) -> Standing:
        certificate, anybody = entry.certificate, not self.trust
        return (
            anybody or entry.signed_by is not None,
            certificate is not None and (anybody or not entry.claimed),
            certificate.retention.mean if certificate else -math.inf,
        )

    def _pulled(self, digest: str) -> WMatrixEntry:
        """The entry of the pulled file."""
        found = look(self.repository, digest)
        signed = bool(self.trust)
        pulled = pull(
            self.repository, found, wmatrices_dir(), trust=self.trust, require_signed=signed
        )
        return WMatrixEntry.read(pulled.path, self.trust)


def entry_of(listing: WMatrixListing, signers: Signers = NO_SIGNERS) -> WMatrixEntry:
    """The entry of a map that is not here. Its certificate is the word of whoever listed it, so it
    is claimed, unless a trusted key is among the `signers`."""
    return WMatrixEntry(
        Path(f"{file_name(listing.name)}.wmatrix"),
        listing.manifest,
        listing.digest,
        listing.tensors,
        signed_by=signers.wmatrix,
        certificate_signed_by=signers.certificate,
        claimed=listing.certificate is not None and signers.certificate is None,
        listed=True,
    )


def claimed_retention(manifest: ImageManifest) -> float:
    """The retention that a map's artefact says outside; less than all others without one."""
    try:
        claim = float((manifest.annotations or {})[RETENTION])
    except (KeyError, ValueError):
        claim = -math.inf
    return claim if math.isfinite(claim) else -math.inf


def with_repository(
    wmatrices: Registry | Sequence[str | Path] | None,
    registry: str | Path | None,
    trust: TrustPolicy,
    *,
    pull: bool = False,
) -> Registry:
    """The maps at hand, then those of a registry.

    Args:
        wmatrices: as `Registry.read` takes them.
        registry: a reference; None is the default registry where the maps at hand are the default
            ones, too, and else none.

    Raises:
        BadInput, WMatrixCorrupt, SignatureInvalid
    """
    if registry is None and wmatrices is not None:
        return Registry.read(wmatrices, trust)
    repository = open_repository(registry or default_registry())
    local = Registry.read(wmatrices, trust)
    return Registry(local.entries, RepositoryMaps(repository, trust, pull))
