"""The store: a folder of packages, one file each, named by ID."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from awareness_vllm.errors import MemoryNotFound
from awareness_vllm.files import default_store
from awareness_vllm.packages.manifest import MEMORY_ID, check_bytes, check_id


@dataclass
class Store:
    """Packages in a folder. `verified` has the file version (inode, size, mtime) whose bytes were
    hashed, by ID."""

    folder: Path
    verified: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def path(self, memory_id: object) -> Path:
        """The file of a memory.

        Raises:
            InvalidMemoryId, MemoryNotFound
        """
        path = self.folder / f"{check_id(memory_id)}.safetensors"
        if not path.is_file():
            raise memory_not_found(memory_id)
        return path

    def has(self, memory_id: object) -> bool:
        """Whether the store has a memory. Raises InvalidMemoryId."""
        return (self.folder / f"{check_id(memory_id)}.safetensors").is_file()

    def checked_path(self, memory_id: object) -> Path:
        """The file of a memory, its bytes checked against the ID once per file version.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageCorrupt
        """
        path = self.path(memory_id)
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise memory_not_found(memory_id) from error
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self.verified.get(path.stem) != version:
            check_bytes(path, path.stem)
            self.verified[path.stem] = version
        return path

    def ids(self) -> Iterator[str]:
        """The IDs in this store, sorted."""
        for path in sorted(self.folder.glob("mem_*.safetensors")):
            if MEMORY_ID.fullmatch(path.stem):
                yield path.stem


def memory_not_found(memory_id: object) -> MemoryNotFound:
    """The error about an ID of which the store has no package."""
    return MemoryNotFound(
        f"no memory {memory_id}",
        found="no such package in this store",
        expected="the ID of a published package",
        remedy="`awareness list` shows the packages of a store; is --store the right one?",
    )


def locate(what: str | Path, store: Path | None = None) -> Path:
    """The file of a package by its path or ID; anything that is not a file is taken as an ID.

    Raises:
        InvalidMemoryId, MemoryNotFound
    """
    if Path(what).is_file():
        return Path(what)
    return Store(store or default_store()).path(str(what))
