"""Blobs on their way into a file: hashed as they come, and gone on with where they stopped."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from awareness_vllm.errors import ArtefactCorrupt, StorageFull
from awareness_vllm.oci.artefact import Descriptor
from awareness_vllm.oci.repository import Progress

CHUNK = 1 << 20
"""Bytes that are received, hashed and written at once."""


class Download:
    """A draft of a blob: `done` of its bytes are there."""

    def __init__(self, file: FileIO, descriptor: Descriptor, progress: Progress) -> None:
        self.descriptor, self.done = descriptor, 0
        self._file, self._progress = file, progress
        self._sha = hashlib.sha256()
        size = os.fstat(file.fileno()).st_size
        self.resumed = 0 < size <= descriptor.size
        if self.resumed:
            while chunk := file.read(CHUNK):
                self._count(chunk)
        else:
            file.truncate(0)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes: hashed and written while a core's cache holds them. A thread that
        hashes beside costs a sixth more of the processor, which the registry or other pulls have.

        Raises:
            ArtefactCorrupt: more than the blob has; StorageFull; OSError.
        """
        if self.done + len(chunk) > self.descriptor.size:
            raise corrupt_blob(self.descriptor, f"more than {self.descriptor.size} bytes")
        self._count(chunk)
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise storage_full(error, self.descriptor.size) from error

    def restart(self) -> None:
        """Forget what is there."""
        self._progress(-self.done)
        self._file.seek(0)
        self._file.truncate(0)
        self._sha, self.done, self.resumed = hashlib.sha256(), 0, False

    @property
    def digest(self) -> str:
        """The sha256, in hex, of what is there."""
        return self._sha.hexdigest()

    def check(self) -> None:
        """Check the whole blob; the draft of another one is emptied. Raises ArtefactCorrupt."""
        digest = self.digest
        if (digest, self.done) != (self.descriptor.hex, self.descriptor.size):
            done = self.done
            self.restart()
            raise corrupt_blob(self.descriptor, f"{done} bytes with sha256:{digest}")

    def _count(self, chunk: bytes) -> None:
        self._sha.update(chunk)
        self.done += len(chunk)
        self._progress(len(chunk))


@contextlib.contextmanager
def download(draft: Path, descriptor: Descriptor, progress: Progress) -> Iterator[Download]:
    """The draft of a blob, of which an interrupted download may have left a part.

    Raises:
        OSError
    """
    handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with FileIO(handle, "r+") as file:
        yield Download(file, descriptor, progress)


def storage_full(error: OSError, size: int) -> Exception:
    """The typed error about a disk or quota without room; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return StorageFull(
        "there is no room for what is pulled",
        found=str(error),
        expected=f"room for {size} bytes",
        remedy="make some, by `awareness gc --limit-gib 0` if need be, and pull again",
    )


def corrupt_blob(
    descriptor: Descriptor, found: str, expected: str | None = None
) -> ArtefactCorrupt:
    """The error about a blob that is not what its descriptor says."""
    return ArtefactCorrupt(
        f"the blob {descriptor.digest} cannot be used",
        found=found,
        expected=expected or f"{descriptor.size} bytes with that digest",
        remedy="push it again",
    )
