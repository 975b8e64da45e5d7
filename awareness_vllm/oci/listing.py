"""Listings: the config blob of an artefact whose one layer is a file, and what is common to all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from awareness_vllm.errors import ArtefactCorrupt, BadInput
from awareness_vllm.oci.artefact import MAX_CONFIG, TITLE, Artefact, Descriptor, Layer
from awareness_vllm.oci.transfer import Found
from awareness_vllm.schema import FrozenModel, PlainName, PlainText
from awareness_vllm.tensor_file import FileRefused, parse_document


@dataclass(frozen=True)
class MediaTypes:
    """The media types of one kind of artefact, and what it is called."""

    kind: str
    artefact: str
    config: str
    layer: str


class FileListing(FrozenModel):
    """What is listed of any file: its sha256 in hex, its size, and what whoever pushed it says of
    it; `license` is an SPDX expression or a name of the Hugging Face hub, of older and foreign
    listings anything."""

    digest: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=1 << 50)
    label: PlainName | None = None
    description: PlainText | None = Field(None, max_length=2000)
    license: PlainName | None = None


SomeListing = TypeVar("SomeListing", bound=FileListing)


def artefact_with(
    listing: FileListing,
    types: MediaTypes,
    path: Path,
    title: str,
    annotations: Mapping[str, str] | None = None,
) -> Artefact:
    """The artefact of a file; `title` is the file's name for whoever pulls it.

    Raises:
        BadInput: a listing too large for a free check.
    """
    config = listing.model_dump_json().encode()
    if len(config) > MAX_CONFIG:
        raise BadInput(
            "the listing is too large to be pushed",
            found=f"{len(config)} bytes",
            expected=f"{MAX_CONFIG} at most: it is read whole before anything is pulled",
            remedy="shorten its description; of a W-Matrix, certify it with fewer --lengths",
        )
    layer = Descriptor(
        media_type=types.layer,
        digest=f"sha256:{listing.digest}",
        size=listing.bytes,
        annotations={TITLE: title},
    )
    return Artefact(types.artefact, types.config, config, [Layer(path, layer)], annotations or {})


def parse_listing(found: Found, model: type[SomeListing], types: MediaTypes) -> SomeListing:
    """The listing in an artefact that was looked up.

    Raises:
        ArtefactCorrupt: another kind of artefact, or one whose listing and layer disagree.
    """
    try:
        if found.manifest.config.media_type != types.config:
            found_type = found.manifest.config.media_type
            raise FileRefused(f"a config of {found_type!r}"[:200], types.config)
        listing = parse_document(model, found.config, "listing")
        layers = [(layer.media_type, layer.hex, layer.size) for layer in found.manifest.layers]
        if layers != [(types.layer, listing.digest, listing.bytes)]:
            raise FileRefused(f"layers {layers}"[:300], "the one that the listing describes")
    except FileRefused as error:
        raise ArtefactCorrupt(
            f"{found.descriptor.digest} is no {types.kind} of ours",
            found=error.found,
            expected=error.expected,
        ) from error
    return listing


def contradicted(name: str) -> ArtefactCorrupt:
    """The error about a pulled file that is not what was listed."""
    return ArtefactCorrupt(
        f"the listing of {name} is not that of its file",
        found="a file with another manifest",
        expected="the manifest in the listing",
        remedy="push the file again",
    )
