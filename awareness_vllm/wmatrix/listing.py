"""The listing of a W-Matrix: both geometries and the certificate, before the map is pulled."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from awareness_vllm.errors import ArtefactCorrupt
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.artefact import Artefact
from awareness_vllm.oci.listing import (
    FileListing,
    MediaTypes,
    artefact_with,
    contradicted,
    parse_listing,
)
from awareness_vllm.oci.transfer import Found
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.wmatrix.certificate import Certificate, parse_certificate
from awareness_vllm.wmatrix.manifest import WMatrixManifest, read_digests, read_manifest

ARTEFACT = "application/vnd.awareness.wmatrix.v1"
CONFIG = "application/vnd.awareness.wmatrix.config.v1+json"
LAYER = "application/vnd.awareness.wmatrix.v1.safetensors"
TYPES = MediaTypes("W-Matrix", ARTEFACT, CONFIG, LAYER)
RETENTION = "vnd.awareness.retention"
"""Annotation of a certified map's artefact: its retention, so that the best of several is found
without reading each one's certificate. The certificate decides."""


class WMatrixListing(FileListing):
    """The config blob of a W-Matrix's artefact, the word of whoever pushed it as a `PackageListing`
    is.

    `tensors` is the digest of its tensors, by which a latent names the map that made it.
    """

    format: Literal["awareness-wmatrix-listing/1"] = "awareness-wmatrix-listing/1"
    tensors: str = Field("", pattern="^([0-9a-f]{64})?$")
    manifest: WMatrixManifest

    @property
    def name(self) -> str:
        """The name that it was listed by, or else its models'."""
        return self.label or f"{self.source_model}--{self.target_model}"

    @property
    def source_model(self) -> str:
        return self.manifest.source.name

    @property
    def target_model(self) -> str:
        return self.manifest.target.name

    @property
    def certificate(self) -> Certificate | None:
        """The measured figures, as far as the listing is believed. Raises ValueError."""
        return parse_certificate(self.manifest.certificate)

    @property
    def pair(self) -> str:
        return pair_of(self.manifest.source, self.manifest.target)

    @property
    def id(self) -> str:
        """`tag`."""
        return self.tag

    @property
    def tag(self) -> str:
        """The tag that this map is found by."""
        return f"{self.pair}.{self.digest[:16]}"

    def check_file(self, path: Path) -> None:
        """Check that a pulled file, whose digest is known to be right, is what was listed.

        Raises:
            ArtefactCorrupt, WMatrixCorrupt
        """
        if read_manifest(path) != self.manifest:
            raise contradicted(f"the W-Matrix {self.name}")


Listing = PackageListing | WMatrixListing
"""What a registry lists: memories and maps."""


def pair_of(source: Geometry, target: Geometry) -> str:
    """The beginning of the tags of all maps between two models, by their fingerprints: `pair_` and
    32 hexadecimal digits."""
    about = "\n".join((source.weights, source.tokenizer, target.weights, target.tokenizer))
    return f"pair_{hashlib.sha256(about.encode()).hexdigest()[:32]}"


def artefact_of(
    path: Path,
    *,
    name: str | None = None,
    description: str | None = None,
    license: str | None = None,
) -> Artefact:
    """The artefact of a W-Matrix's file. Raises WMatrixCorrupt: not a W-Matrix."""
    manifest, digest, tensors = read_digests(path)
    listing = WMatrixListing(
        digest=digest,
        tensors=tensors,
        bytes=path.stat().st_size,
        manifest=manifest,
        label=name,
        description=description,
        license=license,
    )
    certificate = listing.certificate
    notes = {RETENTION: f"{certificate.retention.mean:.6f}"} if certificate else {}
    return artefact_with(listing, TYPES, path, path.name, notes)


def listing_of(found: Found) -> WMatrixListing:
    """The listing in a W-Matrix's artefact, with a certificate that can be.

    Raises:
        ArtefactCorrupt
    """
    listing = parse_listing(found, WMatrixListing, TYPES)
    try:
        parse_certificate(listing.manifest.certificate)
    except ValueError as error:
        raise ArtefactCorrupt(
            f"{found.descriptor.digest} is no W-Matrix of ours",
            found=str(error)[:200],
            expected="a certificate of figures that can be measured",
        ) from error
    return listing
