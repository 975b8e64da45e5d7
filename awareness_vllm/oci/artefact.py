"""Artefacts: an image manifest, its config blob and its layers, by the OCI image specification."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel

from awareness_vllm.oci.reference import DIGEST
from awareness_vllm.tensor_file import parse_document

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY_BLOB = b"{}"
REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
MAX_CONFIG = 64 << 10
"""Bytes of a config blob: what a free check reads of an artefact."""
MAX_MANIFEST = 64 << 10
"""Bytes of an image manifest of ours: one config and a few layers."""
MAX_INDEX = 4 << 20
"""Bytes of a referrers index."""


class _Document(BaseModel):
    """A document of the specification, which has readers ignore fields that they do not know."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore"
    )


class Descriptor(_Document):
    """A blob's or a manifest's media type, digest ("sha256:…") and size in bytes."""

    media_type: str = Field(max_length=255)
    digest: str = Field(pattern=f"^{DIGEST.pattern}$")
    size: int = Field(ge=0, le=1 << 50)
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None

    @property
    def hex(self) -> str:
        """The sha256 in hex."""
        return self.digest.removeprefix("sha256:")


class ImageManifest(_Document):
    """An image manifest."""

    schema_version: int = Field(2, ge=2, le=2)
    media_type: str = MANIFEST
    artifact_type: str | None = None
    config: Descriptor
    layers: list[Descriptor] = Field(max_length=64)
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


class ImageIndex(_Document):
    """An image index: a list of referrers.

    Entries that are no descriptors of ours are left out: whoever may push can put one in, which is
    to hide none of the others.
    """

    schema_version: int = Field(2, ge=2, le=2)
    media_type: str = INDEX
    manifests: list[Descriptor] = []

    @field_validator("manifests", mode="before")
    @classmethod
    def _readable(cls, manifests: Any) -> Any:
        if not isinstance(manifests, list):
            return manifests
        parsed = map(_descriptor, manifests)
        return [descriptor for descriptor in parsed if descriptor is not None]


def _descriptor(entry: Any) -> Descriptor | None:
    try:
        return Descriptor.model_validate(entry, strict=True)
    except ValidationError:
        return None


@dataclass(frozen=True)
class Layer:
    """A layer to push: a file, or bytes, with its descriptor."""

    content: Path | bytes
    descriptor: Descriptor


@dataclass(frozen=True)
class Artefact:
    """An artefact to push: its type, the config blob's media type and bytes, its layers, and the
    artefact that it is about, if any."""

    artifact_type: str
    config_type: str
    config: bytes
    layers: Sequence[Layer]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None

    @property
    def config_layer(self) -> Layer:
        return Layer(self.config, descriptor_of(self.config, self.config_type))

    @property
    def document(self) -> bytes:
        """The image manifest, in JSON; the same bytes each time."""
        manifest = ImageManifest(
            artifact_type=self.artifact_type,
            config=self.config_layer.descriptor,
            layers=[layer.descriptor for layer in self.layers],
            annotations=dict(self.annotations) or None,
            subject=self.subject,
        )
        return manifest.model_dump_json(by_alias=True, exclude_none=True).encode()


def descriptor_of(
    content: bytes, media_type: str, annotations: Mapping[str, str] | None = None
) -> Descriptor:
    """The descriptor of some bytes."""
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    notes = dict(annotations) if annotations else None
    return Descriptor(media_type=media_type, digest=digest, size=len(content), annotations=notes)


def parse_image_manifest(raw: bytes) -> ImageManifest:
    """An image manifest. Raises FileRefused."""
    return parse_document(ImageManifest, raw, "image manifest")
