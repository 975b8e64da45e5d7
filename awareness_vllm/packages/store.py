"""The store: a folder of packages, one file each, named by ID."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.errors import MemoryNotFound, PackageTooLarge
from awareness_vllm.files import default_store
from awareness_vllm.packages.manifest import MEMORY_ID, check_id


@dataclass(frozen=True)
class Store:
    """Packages in a folder, and those `pulled` from a registry into a second one, which stores may
    share, and only read. The first one's file of a memory counts."""

    folder: Path
    pulled: Path | None = None

    def path(self, memory_id: object) -> Path:
        """The file of a memory.

        Raises:
            InvalidMemoryId, MemoryNotFound
        """
        name = file_of(memory_id)
        for folder in (self.folder, self.pulled):
            if folder is not None and (path := folder / name).is_file():
                return path
        raise memory_not_found(memory_id)

    def has(self, memory_id: object) -> bool:
        """Whether the store has a memory. Raises InvalidMemoryId."""
        try:
            return bool(self.path(memory_id))
        except MemoryNotFound:
            return False

    def is_pulled(self, memory_id: object) -> bool:
        """Whether a memory that the store has is one from a registry. Raises InvalidMemoryId,
        MemoryNotFound."""
        return self.path(memory_id).parent != self.folder

    def size(self, memory_id: object, *, limit: int | None = None) -> int:
        """Bytes of a memory's file.

        Raises:
            InvalidMemoryId, MemoryNotFound; PackageTooLarge: more than `limit`.
        """
        path = self.path(memory_id)
        try:
            size = path.stat(follow_symlinks=False).st_size
        except FileNotFoundError as error:
            raise memory_not_found(memory_id) from error
        if limit is not None and size > limit:
            raise PackageTooLarge(
                f"memory {memory_id} is larger than this server loads",
                found=f"{size / 2**30:.3g} GiB",
                expected=f"{limit / 2**30:.3g} GiB at most",
                remedy="start the server with a larger --max-load-gib",
            )
        return size

    def ids(self) -> Iterator[str]:
        """The IDs in the store's own folder, sorted."""
        for path in sorted(self.folder.glob("mem_*.safetensors")):
            if MEMORY_ID.fullmatch(path.stem):
                yield path.stem


def file_of(memory_id: object) -> str:
    """The name of a memory's file. Raises InvalidMemoryId."""
    return f"{check_id(memory_id)}.safetensors"


def version_of(path: Path) -> tuple[int, ...]:
    """What changes whenever somebody writes to a file: nobody can set its time of change.

    Raises:
        MemoryNotFound: it went away.
    """
    try:
        facts = path.stat(follow_symlinks=False)
    except FileNotFoundError as error:
        raise memory_not_found(path.stem) from error
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def digest_in(memory_id: str) -> str:
    """The beginning of the sha256, in hex, that a well-formed ID names."""
    return memory_id.removeprefix("mem_")


def memory_not_found(memory_id: object) -> MemoryNotFound:
    """The error about an ID of which the store has no package."""
    return MemoryNotFound(
        f"no memory {memory_id}",
        found="no such package in this store",
        expected="the ID of a published package",
        remedy="`awareness list` shows those of a store, `awareness search` those of a registry",
    )


def locate(what: str | Path, store: Path | None = None) -> Path:
    """The file of a package by its path or ID; anything that is not a file is taken as an ID.

    Raises:
        InvalidMemoryId, MemoryNotFound
    """
    if Path(what).is_file():
        return Path(what)
    return Store(store or default_store()).path(str(what))
