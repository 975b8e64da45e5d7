"""The listing of a package: all that is known of a memory before it is pulled."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from awareness_vllm.oci.artefact import Artefact
from awareness_vllm.oci.listing import (
    FileListing,
    MediaTypes,
    artefact_with,
    contradicted,
    parse_listing,
)
from awareness_vllm.oci.transfer import Found
from awareness_vllm.packages.manifest import Manifest, id_of, read_manifest, refusing
from awareness_vllm.tensor_file import digest_of

ARTEFACT = "application/vnd.awareness.memory.v1"
CONFIG = "application/vnd.awareness.memory.config.v1+json"
LAYER = "application/vnd.awareness.memory.v1.safetensors"
TYPES = MediaTypes("memory", ARTEFACT, CONFIG, LAYER)


class PackageListing(FileListing):
    """The config blob of a memory's artefact. It is the word of whoever pushed it, until the
    package is there: `check_file` compares them."""

    format: Literal["awareness-memory-listing/1"] = "awareness-memory-listing/1"
    manifest: Manifest

    @property
    def id(self) -> str:
        """The memory's ID."""
        return id_of(self.digest)

    @property
    def tag(self) -> str:
        """The tag that this memory is found by: its ID."""
        return self.id

    @property
    def name(self) -> str:
        """The name that it was listed by, or else its package's, or its ID."""
        return self.label or self.manifest.name or self.id

    @property
    def source_model(self) -> str:
        """The name of the model that computed the states."""
        return self.manifest.geometry.name

    @property
    def token_count(self) -> int:
        """Tokens of the source model."""
        return self.manifest.tokens

    def check_file(self, path: Path) -> None:
        """Check that a pulled package, whose digest is known to be right, is what was listed.

        Raises:
            ArtefactCorrupt, PackageCorrupt
        """
        if read_manifest(path) != self.manifest:
            raise contradicted(self.id)


def artefact_of(
    path: Path,
    *,
    name: str | None = None,
    description: str | None = None,
    license: str | None = None,
) -> Artefact:
    """The artefact of a package's file; its listing has nothing of the text.

    Raises:
        PackageCorrupt: not a package.
    """
    manifest = read_manifest(path)
    with refusing(path):
        digest = digest_of(path)
    listing = PackageListing(
        digest=digest,
        bytes=path.stat().st_size,
        manifest=manifest,
        label=name,
        description=description,
        license=license,
    )
    return artefact_with(listing, TYPES, path, f"{listing.id}.safetensors")


def listing_of(found: Found) -> PackageListing:
    """The listing in a memory's artefact. Raises ArtefactCorrupt."""
    return parse_listing(found, PackageListing, TYPES)
