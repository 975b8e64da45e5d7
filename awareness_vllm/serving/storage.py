"""Room for captures: each tenant's quota, space that stays free, and a full disk."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from awareness_vllm.errors import StorageFull
from awareness_vllm.files import disk_error
from awareness_vllm.serving.config import ServingConfig

GIB = 2**30


@dataclass(frozen=True)
class CaptureLimits:
    """Bytes up to which captures may fill a tenant's store, and bytes of the disk that they leave
    free; none may be captured unless it is `allowed`."""

    allowed: bool = False
    quota: int = 10 * GIB
    min_free: int = GIB
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @classmethod
    def from_config(cls, config: ServingConfig) -> CaptureLimits:
        quota, min_free = int(config.capture_quota_gib * GIB), int(config.min_free_gib * GIB)
        return cls(config.allow_capture, quota, min_free)

    def check(self, folder: Path, size: int) -> None:
        """Refuse a capture of `size` bytes into a store that has no room for it.

        Raises:
            StorageFull
        """
        if (used := bytes_in(folder)) + size > self.quota:
            raise StorageFull(
                "the tenant's store has no room for this capture",
                found=f"{used / GIB:.3f} GiB in the store, and {size / GIB:.3f} more",
                expected=f"{self.quota / GIB:g} GiB at most",
                remedy="remove packages from the store, or raise --capture-quota-gib",
            )
        if (free := free_bytes(folder)) - size < self.min_free:
            raise StorageFull(
                "the store's disk has no room for this capture",
                found=f"{free / GIB:.3f} GiB free, and a capture of {size / GIB:.3f}",
                expected=f"{self.min_free / GIB:g} GiB that stay free",
                remedy="free some space, or lower --min-free-gib",
            )

    def publish(self, folder: Path, size: int, publish: Callable[[], Path]) -> Path:
        """Publish a capture of `size` bytes if there is still room: others may have come between.

        Raises:
            StorageFull
        """
        with self.lock:
            self.check(folder, size)
            try:
                return publish()
            except Exception as error:
                if found := disk_error(error):
                    raise not_written(found) from error
                raise


def not_written(found: str) -> StorageFull:
    """The error of a capture that the disk did not take after all, with what the system says."""
    return StorageFull(
        "the capture could not be written",
        found=found,
        expected="room for the prompt's states, in the store and in the folder for temporary files",
        remedy="free some space (--min-free-gib says how much captures leave), and see that the "
        "server may write to both folders",
    )


def bytes_in(folder: Path) -> int:
    """Bytes of a folder's files; none where there is no folder yet."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # removed meanwhile
                if entry.is_file(follow_symlinks=False):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be on."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
