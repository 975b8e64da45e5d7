"""Files of the product: where they are, atomic writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from awareness_vllm.errors import BadInput, UnsupportedModel

DRAFT = ".draft-"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
OS_ERROR = re.compile(r"os error (\d+)")
"""How safetensors' writer, which is not Python's, names the system's error."""


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to; that file takes the place of `path` when the block ends. Where the block
    fails or its process is killed, `path` is as it was; where the machine dies, too, unless it is
    not `durable`: what no later process reads need not wait for the disk."""
    with scratch_folder(path.parent) as scratch:
        draft = scratch / path.name
        yield draft
        put_in_place(draft, path, durable=durable)


def replace_text(path: Path, text: str) -> None:
    """Write a text file as a whole, or leave what is there; a pipe or a device is written to."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with atomic_write(path.resolve()) as draft:
        draft.write_text(text, encoding="utf-8")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of a writer says that the disk, or the user's share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in FULL
    match = OS_ERROR.search(str(error))
    return match is not None and int(match[1]) in FULL


def disk_error(error: BaseException) -> str | None:
    """What the system says in an error of a writer: that the disk is full, or the folder read-only;
    None where the error is another one."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    match = OS_ERROR.search(str(error))
    return os.strerror(int(match[1])) if match else None


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder in a folder, for drafts; removed when the block ends. What killed processes left
    of theirs is removed first, unless another process is writing into the folder.

    Writers hold a shared lock on the folder itself (flock). Where the file system cannot lock
    folders (NFS), they write without it and nothing is swept; one that sweeps such a folder from
    elsewhere can take a draft away, so that its write fails, but no finished file.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sweep(folder, handle)
        _lock(handle, fcntl.LOCK_SH)
        # A folder, since libraries have drafts of their own: safetensors writes beside its file.
        scratch = folder / f"{DRAFT}{uuid.uuid4().hex}"
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(handle)


def put_in_place(
    draft: Path, path: Path, *, durable: bool = True, name_durable: bool = True
) -> None:
    """Move a finished draft of a `scratch_folder` to its path, with the access that the umask gives
    new files. Its bytes are on the disk before its name is; on return its name is there, too,
    unless it need not be (`name_durable`): what can be had again may be gone after a crash."""
    draft.chmod(draft.parent.stat().st_mode & 0o666)
    if durable:
        _sync(draft)
    os.replace(draft, path)
    if durable and name_durable:
        _sync(path.parent)


def write_new(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a whole file that was not there before, with a mode less the umask.

    Raises:
        FileExistsError: it was.
    """
    with scratch_folder(path.parent) as scratch:
        draft = scratch / path.name
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        _sync(draft)
        os.link(draft, path)  # unlike a rename, it replaces nothing
    _sync(path.parent)


def sweep(folder: Path) -> None:
    """Remove the drafts that killed processes left in a folder, if nobody is writing into it now.
    A missing or read-only folder stays as it is."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # whoever wants to use the folder will say so
        return
    try:
        _sweep(folder, handle)
    finally:
        os.close(handle)


def _sweep(folder: Path, handle: int) -> None:
    leftovers = list(folder.glob(f"{DRAFT}*"))
    if not leftovers or not _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return
    # Again, under the lock: drafts of writers that have ended in between are gone or leftovers.
    for leftover in folder.glob(f"{DRAFT}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:  # version 0.1 had files
            with contextlib.suppress(OSError):
                leftover.unlink()
    _lock(handle, fcntl.LOCK_UN)


def _lock(handle: int, kind: int) -> bool:
    """Whether the lock was taken: not where it is held, or where there are no locks."""
    try:
        fcntl.flock(handle, kind)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # CIFS cannot, for folders
            raise
    finally:
        os.close(handle)


def home() -> Path:
    """`$AWARENESS_HOME`, by default `~/.cache/awareness`."""
    return Path(os.environ.get("AWARENESS_HOME") or Path.home() / ".cache" / "awareness")


def models_dir() -> Path:
    return home() / "models"


def wmatrices_dir() -> Path:
    return home() / "wmatrices"


def geometries_dir() -> Path:
    return home() / "geometries"


def listings_dir() -> Path:
    """Derived from what registries list; may be deleted at any time."""
    return home() / "cache" / "listings"


def anchors_dir() -> Path:
    return home() / "anchors"


def default_store() -> Path:
    return home() / "store"


def file_digest(path: Path) -> str:
    """sha256 of a whole file, in hex. Raises UnsupportedModel where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnsupportedModel(f"cannot read {path}", found=str(error)) from error


def read_text_file(path: Path) -> str:
    """The text of a file, line ends unchanged; the byte order mark that editors on Windows put
    before it is no part of it.

    Raises:
        BadInput: missing, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read {path}", found=str(error), expected="a UTF-8 text file"
        ) from error
