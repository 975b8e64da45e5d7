"""A folder in OCI image layout as a repository: no server is needed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import IO

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, BadInput, RegistryError
from awareness_vllm.files import DRAFT, home, put_in_place, scratch_folder
from awareness_vllm.oci.artefact import (
    MAX_MANIFEST,
    REF_NAME,
    Descriptor,
    Layer,
    descriptor_of,
    parse_image_manifest,
)
from awareness_vllm.oci.deadline import check_deadline
from awareness_vllm.oci.download import CHUNK, Download, corrupt_blob, download
from awareness_vllm.oci.index_file import Entry, entries, tag_of, written
from awareness_vllm.oci.reference import Reference
from awareness_vllm.oci.repository import INTERNAL, Progress, Tagged, no_progress
from awareness_vllm.tensor_file import FileRefused, is_whole, opened

MARKER = "oci-layout"
NewManifest = tuple[bytes, str, str | None]
"""A manifest's bytes, its media type, and a tag or None."""
SUBJECT = "vnd.awareness.subject"
"""Annotation of an entry of the index: the digest of the manifest that it refers to."""
LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'


class Layout:
    """A layout folder, which the first write makes.

    `index.json` names all manifests; it is replaced as a whole under a lock, so that readers,
    which take none, see each push or not at all.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.folder = Path(reference.repository)

    @property
    def index_file(self) -> Path:
        return self.folder / "index.json"

    def blob_path(self, descriptor: Descriptor) -> Path:
        """The file of a blob."""
        return self.folder / "blobs" / "sha256" / descriptor.hex

    def manifest(self, name: str) -> tuple[Descriptor, bytes]:
        found = [e for e in entries(self.index_file, name) if name in (e["digest"], tag_of(e))]
        if not found:
            raise ArtefactNotFound(
                f"{self.reference} has no {name}",
                found=self._absence() or "no such tag or digest in its index.json",
                expected="one that `awareness search` shows",
                remedy=self._meant,
            )
        descriptor = self._descriptor(found[-1])
        return descriptor, self.blob(descriptor, MAX_MANIFEST)

    def _descriptor(self, entry: Entry) -> Descriptor:
        try:
            return Descriptor.model_validate(entry)
        except ValueError as error:
            raise RegistryError(
                f"{self.folder} cannot be used as a layout", found=str(error)[:200]
            ) from error

    def blob(self, descriptor: Descriptor, limit: int) -> bytes:
        check_deadline()
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
                resumed = into.resumed
                self._read(file, into)
                if resumed and into.digest != descriptor.hex:
                    into.restart()  # what was there already may have been at fault
                    self._read(file, into)
                into.check()
        except FileRefused as error:
            raise corrupt_blob(descriptor, str(error)) from error

    def _read(self, file: IO[bytes], into: Download) -> None:
        file.seek(into.done)
        while chunk := file.read(CHUNK):
            into.write(chunk)

    def upload(self, layer: Layer, progress: Progress = no_progress) -> None:
        path = self.blob_path(layer.descriptor)
        # A crash or a bad disk can leave other bytes of the right size.
        if is_whole(path, layer.descriptor.hex):
            progress(layer.descriptor.size)
            return
        self._check_new()
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

    def put_manifest(self, raw: bytes, media_type: str, *tags: str) -> Descriptor:
        return self.put_manifests([(raw, media_type, tag) for tag in tags or (None,)])[0]

    def put_manifests(self, manifests: Iterable[NewManifest]) -> list[Descriptor]:
        """Write manifests, whose blobs are there, and the tags that are to name them: the index is
        written once. Raises RegistryError."""
        new = [self._upload_manifest(*manifest) for manifest in manifests]
        digests = {entry.digest for entry in new}
        named = {tag: entry for entry in new if (tag := _tag(entry)) is not None}
        with self._locked():
            old = list(entries(self.index_file))
            # A referrer whose tag another one takes is listed all the same.
            kept = [
                _untagged(e) if _displaced(e, digests, named.keys()) else e
                for e in old
                if not _replaced(e, digests, named.keys())
            ]
            tagged = {e["digest"] for e in kept if tag_of(e) is not None}
            tagged |= {entry.digest for entry in named.values()}
            plain = {e.digest: e for e in new if e.digest not in tagged}
            added = (*plain.values(), *named.values())
            self._write([*kept, *(e.model_dump(by_alias=True, exclude_none=True) for e in added)])
        return new

    def _upload_manifest(self, raw: bytes, media_type: str, tag: str | None) -> Descriptor:
        plain = descriptor_of(raw, media_type)
        self.upload(Layer(raw, plain))
        parsed = parse_image_manifest(raw)
        notes = dict(parsed.annotations or {})
        if tag is not None:
            notes[REF_NAME] = tag
        if parsed.subject is not None:
            notes[SUBJECT] = parsed.subject.digest
        update = {"artifact_type": parsed.artifact_type, "annotations": notes or None}
        return plain.model_copy(update=update)

    def tags(self, prefix: str = "", *, internal: bool = False) -> Iterator[str]:
        tags = (tag_of(entry) for entry in entries(self.index_file, prefix))
        named = (tag for tag in tags if tag is not None and tag.startswith(prefix))
        return (tag for tag in named if bool(INTERNAL.fullmatch(tag)) == internal)

    def tagged(self) -> Iterator[Tagged]:
        absence = self._absence()
        # The default one may be yet to come.
        if absence and self.folder.resolve() != (home() / "registry").resolve():
            raise ArtefactNotFound(
                f"{self.reference} is no registry",
                found=absence,
                expected="oci://HOST/REPOSITORY, or a folder that `awareness push` has made",
                remedy=self._meant,
            )
        for entry in entries(self.index_file):
            if (tag := tag_of(entry)) is not None and not INTERNAL.fullmatch(tag):
                yield Tagged(tag, entry["digest"], entry.get("size"), entry.get("artifactType"))

    def version(self) -> str | None:
        try:
            facts = self.index_file.stat()
        except OSError:  # whoever reads it will say so
            return None
        return f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"

    def referrers(self, digest: str, artifact_type: str | None = None) -> list[Descriptor]:
        found = (
            self._descriptor(entry)
            for entry in entries(self.index_file)
            if artifact_type in (None, entry.get("artifactType")) and self._subject(entry) == digest
        )
        return list({descriptor.digest: descriptor for descriptor in found}.values())

    def _subject(self, entry: Entry) -> str | None:
        """The digest of the manifest that an artefact refers to."""
        if (ours := _noted_subject(entry)) is not None:
            return ours
        if tag_of(entry) is not None:
            return None  # it is known by its own name
        # Written by another program: the manifest says it, and the index need not.
        try:
            raw = self.blob(self._descriptor(entry), MAX_MANIFEST)
            subject = parse_image_manifest(raw).subject
        except (FileRefused, ArtefactCorrupt):  # an index, say, or one whose blob is gone
            return None
        return None if subject is None else subject.digest

    @property
    def _meant(self) -> str | None:
        """What to write where a registry was meant."""
        meant = None if self.folder.is_dir() else Reference.meant(str(self.reference))
        return None if meant is None else f"write {meant} if a registry is meant"

    def _absence(self) -> str | None:
        """What is there instead of an index; None where there is one."""
        if self.index_file.exists():
            return None
        return "a folder without an index.json" if self.folder.is_dir() else "no such folder"

    def _check_new(self) -> None:
        """Check that the first write makes a layout where a user may have meant one. Raises
        BadInput."""
        if self.index_file.exists():
            return
        if self.folder.is_dir():
            ours = ("blobs", MARKER, DRAFT)  # of another first push
            others = [f.name for f in self.folder.iterdir() if not f.name.startswith(ours)]
            found = f"a folder with other files, such as {others[0]}" if others else None
        else:
            parent = self.folder.parent
            found = None if parent.is_dir() or parent == home() else f"no folder {parent}"
        if found:
            raise BadInput(
                f"{self.folder} cannot become a folder in OCI image layout",
                found=found,
                expected="oci://HOST/REPOSITORY, or a folder that is new or empty",
                remedy=self._meant,
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder / "blobs", os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _write(self, manifests: list[Entry]) -> None:
        index = written(manifests)
        with scratch_folder(self.folder) as scratch:
            for name, content in ((MARKER, LAYOUT), (self.index_file.name, index)):
                (scratch / name).write_bytes(content)
                put_in_place(scratch / name, self.folder / name)


def _tag(manifest: Descriptor) -> str | None:
    return (manifest.annotations or {}).get(REF_NAME)


def _noted_subject(entry: Entry) -> str | None:
    """The subject that we have noted of an artefact."""
    notes = entry.get("annotations")
    subject = notes.get(SUBJECT) if isinstance(notes, dict) else None
    return subject if isinstance(subject, str) else None


def _displaced(old: Entry, digests: Set[str], tags: Set[str]) -> bool:
    """Whether an entry is a referrer that loses its tag to another manifest."""
    return tag_of(old) in tags and old["digest"] not in digests and _noted_subject(old) is not None


def _untagged(entry: Entry) -> Entry:
    notes = {key: note for key, note in entry["annotations"].items() if key != REF_NAME}
    return entry | {"annotations": notes}


def _replaced(old: Entry, digests: Set[str], tags: Set[str]) -> bool:
    """Whether new manifests take an entry's place: that of their tags, or of themselves without
    one."""
    if (tag := tag_of(old)) is None:
        return old["digest"] in digests
    return tag in tags and not _displaced(old, digests, tags)
