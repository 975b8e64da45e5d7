"""A repository of artefacts, in a registry or in a folder: what both can do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from awareness_vllm.oci.artefact import Descriptor, Layer
from awareness_vllm.oci.reference import Reference

Progress = Callable[[int], None]
"""Called with the number of bytes that have gone through since the last call."""

INTERNAL = re.compile(r"sha256-[0-9a-f]{64}(\.([0-9a-f]{16}|[0-9a-f]{32}))?")
"""Internal tags: the index of a manifest's referrers, each referrer that is in one; with 32 digits
the signature of a file by one key, and the claim of a name's version."""


class Tagged(NamedTuple):
    """A tag; and the digest, size and artifact type of its manifest, where a repository knows them
    without being asked for each."""

    tag: str
    digest: str | None = None
    size: int | None = None
    artifact_type: str | None = None


def no_progress(_: int) -> None:
    """Progress that nobody watches."""


class Repository(Protocol):
    """A repository. Blobs and manifests are named by their digests, tags name manifests.

    Whatever is returned or written has the digest and the size that it should have: errors are
    typed (`RegistryError` and its kin), and leave nothing half-written. All of them end by the
    deadline of the thread that asks (`oci/deadline`), if it has one.
    """

    reference: Reference

    def manifest(self, name: str) -> tuple[Descriptor, bytes]:
        """A manifest by tag or digest. Raises ArtefactNotFound, ArtefactCorrupt, RegistryError."""
        ...

    def blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """A small blob of at most `limit` bytes. Raises as `manifest` does."""
        ...

    def fetch(self, descriptor: Descriptor, draft: Path, progress: Progress = no_progress) -> None:
        """Write a blob to a file, going on where an interrupted `fetch` of the same blob into this
        file has stopped. Raises as `manifest` does; OSError for a disk that is full."""
        ...

    def upload(self, layer: Layer, progress: Progress = no_progress) -> None:
        """Write a blob, unless it is there. Raises RegistryError."""
        ...

    def put_manifest(self, raw: bytes, media_type: str, *tags: str) -> Descriptor:
        """Write a manifest, whose blobs are there, and have tags name it; its descriptor. Raises
        RegistryError."""
        ...

    def tags(self, prefix: str = "", *, internal: bool = False) -> Iterator[str]:
        """All tags, or those that begin so: those for people, or the `internal` ones. Raises
        RegistryError."""
        ...

    def tagged(self) -> Iterator[Tagged]:
        """All tags, with the manifests that are known. Raises RegistryError."""
        ...

    def version(self) -> str | None:
        """What changes whenever a tag does; None where only asking for all of them can tell."""
        ...

    def referrers(self, digest: str, artifact_type: str | None = None) -> list[Descriptor]:
        """The artefacts whose subject is a manifest, or those of one type; of too many, only the
        first that a registry lists. Raises RegistryError."""
        ...
