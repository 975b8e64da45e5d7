"""A folder in OCI image layout as a repository: no server is needed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from awareness_vllm.errors import ArtefactNotFound, RegistryError
from awareness_vllm.files import put_in_place, scratch_folder
from awareness_vllm.oci.artefact import (
    MAX_MANIFEST,
    REF_NAME,
    Descriptor,
    ImageIndex,
    Layer,
    descriptor_of,
    parse_image_manifest,
)
from awareness_vllm.oci.download import CHUNK, corrupt_blob, download
from awareness_vllm.oci.reference import Reference
from awareness_vllm.oci.repository import Progress, no_progress
from awareness_vllm.tensor_file import FileRefused, opened

MARKER = "oci-layout"
LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'


class Layout:
    """A layout folder, which the first write makes.

    `index.json` names all manifests; it is replaced as a whole under a lock, so that readers,
    which take none, see each push or not at all.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.folder = Path(reference.repository)

    def blob_path(self, descriptor: Descriptor) -> Path:
        """The file of a blob."""
        return self.folder / "blobs" / "sha256" / descriptor.hex

    def index(self) -> ImageIndex:
        """All manifests, tagged or not; none where there is no folder yet. Raises RegistryError."""
        try:
            raw = (self.folder / "index.json").read_bytes()
            return ImageIndex.model_validate_json(raw)
        except FileNotFoundError:
            return ImageIndex()
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"{self.folder} cannot be used as a layout",
                found=str(error)[:200],
                expected="an index.json of the OCI image layout",
            ) from error

    def manifest(self, name: str) -> tuple[Descriptor, bytes]:
        matches = [m for m in self.index().manifests if name in (m.digest, _tag(m))]
        if not matches:
            raise ArtefactNotFound(
                f"{self.reference} has no {name}",
                found="no such tag or digest in its index.json",
                expected="one that `awareness search` shows",
            )
        return matches[-1], self.blob(matches[-1], MAX_MANIFEST)

    def blob(self, descriptor: Descriptor, limit: int) -> bytes:
        if descriptor.size > limit:
            raise corrupt_blob(descriptor, f"{descriptor.size} bytes", f"{limit} at most")
        try:
            with opened(self.blob_path(descriptor), limit=descriptor.size) as (file, _):
                content = file.read(descriptor.size + 1)
        except (FileRefused, OSError) as error:
            raise corrupt_blob(descriptor, str(error)) from error
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if (digest, len(content)) != (descriptor.digest, descriptor.size):
            raise corrupt_blob(descriptor, f"{len(content)} bytes with {digest}")
        return content

    def fetch(self, descriptor: Descriptor, draft: Path, progress: Progress = no_progress) -> None:
        try:
            with (
                opened(self.blob_path(descriptor), limit=descriptor.size) as (file, _),
                download(draft, descriptor, progress) as into,
            ):
                file.seek(into.done)
                while chunk := file.read(CHUNK):
                    into.write(chunk)
                into.check()
        except FileRefused as error:
            raise corrupt_blob(descriptor, str(error)) from error

    def upload(self, layer: Layer, progress: Progress = no_progress) -> None:
        path = self.blob_path(layer.descriptor)
        if path.is_file() and path.stat().st_size == layer.descriptor.size:
            progress(layer.descriptor.size)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path.parent) as scratch:
            draft = scratch / path.name
            if isinstance(layer.content, bytes):
                draft.write_bytes(layer.content)
                progress(layer.descriptor.size)
            else:
                self._copy(layer.content, layer.descriptor, draft, progress)
            put_in_place(draft, path)

    def _copy(self, source: Path, descriptor: Descriptor, draft: Path, progress: Progress) -> None:
        sha = hashlib.sha256()
        with source.open("rb") as file, draft.open("wb") as copy:
            while chunk := file.read(CHUNK):
                sha.update(chunk)
                copy.write(chunk)
                progress(len(chunk))
        if sha.hexdigest() != descriptor.hex:
            raise corrupt_blob(descriptor, f"sha256:{sha.hexdigest()}, of a file that has changed")

    def put_manifest(self, raw: bytes, media_type: str, tag: str | None = None) -> Descriptor:
        plain = descriptor_of(raw, media_type)
        self.upload(Layer(raw, plain))
        parsed = parse_image_manifest(raw)
        notes = {**(parsed.annotations or {}), **({REF_NAME: tag} if tag else {})}
        update = {"artifact_type": parsed.artifact_type, "annotations": notes or None}
        entry = plain.model_copy(update=update)
        with self._locked():
            index = self.index()
            kept = [m for m in index.manifests if not _replaces(entry, m)]
            if tag is not None or not any(m.digest == entry.digest for m in kept):
                kept.append(entry)
            self._write(index.model_copy(update={"manifests": kept}))
        return entry

    def tags(self) -> Iterator[str]:
        for manifest in self.index().manifests:
            if (tag := _tag(manifest)) is not None:
                yield tag

    def referrers(self, digest: str) -> list[Descriptor]:
        found = []
        for entry in self.index().manifests:
            # A manifest that refers to another one says so; the index need not.
            manifest = parse_image_manifest(self.blob(entry, MAX_MANIFEST))
            if manifest.subject is not None and manifest.subject.digest == digest:
                found.append(entry)
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder / "blobs", os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _write(self, index: ImageIndex) -> None:
        document = index.model_dump(by_alias=True, exclude_none=True)
        with scratch_folder(self.folder) as scratch:
            for name, content in (
                (MARKER, LAYOUT),
                ("index.json", json.dumps(document, separators=(",", ":")).encode()),
            ):
                (scratch / name).write_bytes(content)
                put_in_place(scratch / name, self.folder / name)


def _tag(manifest: Descriptor) -> str | None:
    return (manifest.annotations or {}).get(REF_NAME)


def _replaces(new: Descriptor, old: Descriptor) -> bool:
    """Whether an entry of the index takes another one's place: of its tag, or of the same manifest
    without one."""
    if _tag(old) is None:
        return old.digest == new.digest
    return _tag(old) == _tag(new)
