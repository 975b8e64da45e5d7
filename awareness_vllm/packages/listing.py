"""The listing of a package: all that is known of a memory before it is pulled."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from awareness_vllm.errors import ArtefactCorrupt
from awareness_vllm.oci.artefact import TITLE, Artefact, Descriptor, Layer, config_blob
from awareness_vllm.oci.transfer import Found
from awareness_vllm.packages.manifest import MEMORY_ID, Manifest, id_of, read_manifest, refusing
from awareness_vllm.schema import FrozenModel, PlainName, PlainText
from awareness_vllm.tensor_file import FileRefused, digest_of, parse_document

ARTEFACT = "application/vnd.awareness.memory.v1"
CONFIG = "application/vnd.awareness.memory.config.v1+json"
LAYER = "application/vnd.awareness.memory.v1.safetensors"


class PackageListing(FrozenModel):
    """The config blob of a memory's artefact. It is the word of whoever pushed it, until the
    package is there: `check_file` compares them.

    `digest` is the sha256, in hex, of the package's file, which has so many `bytes`; `license` is
    an SPDX expression.
    """

    format: Literal["awareness-memory-listing/1"] = "awareness-memory-listing/1"
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=1 << 50)
    manifest: Manifest
    label: PlainName | None = None
    description: PlainText | None = Field(None, max_length=2000)
    license: PlainName | None = None

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
            raise ArtefactCorrupt(
                f"the listing of {self.id} is not that of its package",
                found="a package with another manifest",
                expected="the manifest in the listing",
                remedy="push the package again",
            )


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
    layer = Descriptor(
        media_type=LAYER,
        digest=f"sha256:{digest}",
        size=listing.bytes,
        annotations={TITLE: f"{listing.id}.safetensors"},
    )
    return Artefact(ARTEFACT, CONFIG, config_blob(listing), [Layer(path, layer)])


def listing_of(found: Found) -> PackageListing:
    """The listing in an artefact that was looked up.

    Raises:
        ArtefactCorrupt: another kind of artefact, or one whose listing and layer disagree.
    """
    try:
        if found.manifest.config.media_type != CONFIG:
            raise FileRefused(f"a config of {found.manifest.config.media_type!r}"[:200], CONFIG)
        listing = parse_document(PackageListing, found.config, "listing")
        layers = [(layer.media_type, layer.hex, layer.size) for layer in found.manifest.layers]
        if layers != [(LAYER, listing.digest, listing.bytes)]:
            raise FileRefused(f"layers {layers}"[:300], "the one that the listing describes")
    except FileRefused as error:
        raise ArtefactCorrupt(
            f"{found.descriptor.digest} is no memory's artefact",
            found=error.found,
            expected=error.expected,
        ) from error
    assert MEMORY_ID.fullmatch(listing.id)
    return listing
