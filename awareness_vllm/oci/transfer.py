"""Pushing and pulling whole artefacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from awareness_vllm.errors import ArtefactCorrupt
from awareness_vllm.oci.artefact import (
    MANIFEST,
    MAX_CONFIG,
    Artefact,
    Descriptor,
    ImageManifest,
    parse_image_manifest,
)
from awareness_vllm.oci.repository import Progress, Repository, no_progress
from awareness_vllm.tensor_file import FileRefused


@dataclass(frozen=True)
class Found:
    """An artefact of a repository, read as far as its config blob, and no further."""

    descriptor: Descriptor
    manifest: ImageManifest
    config: bytes


def push(
    repository: Repository,
    artefact: Artefact,
    tags: Sequence[str] = (),
    progress: Progress = no_progress,
) -> Descriptor:
    """Write an artefact; its blobs first, so that nobody sees a manifest without them.

    Raises:
        RegistryError
    """
    for layer in (artefact.config_layer, *artefact.layers):
        repository.upload(layer, progress)
    return repository.put_manifest(artefact.document, MANIFEST, *tags)


def look(repository: Repository, name: str) -> Found:
    """An artefact by tag or digest: its manifest and its config blob alone are read.

    Raises:
        ArtefactNotFound, ArtefactCorrupt, RegistryError
    """
    descriptor, raw = repository.manifest(name)
    manifest = parsed(descriptor, raw)
    return Found(descriptor, manifest, repository.blob(manifest.config, MAX_CONFIG))


def parsed(descriptor: Descriptor, raw: bytes) -> ImageManifest:
    """An image manifest that was read. Raises ArtefactCorrupt."""
    try:
        return parse_image_manifest(raw)
    except FileRefused as error:
        raise ArtefactCorrupt(
            f"{descriptor.digest} cannot be used", found=error.found, expected="an image manifest"
        ) from error
