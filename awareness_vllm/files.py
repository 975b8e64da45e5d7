"""Files that others may change while we read them, or read while we write them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from awareness_vllm.errors import BadInput, UnsupportedModel


@contextlib.contextmanager
def private_copy(path: Path) -> Iterator[str]:
    """A path to a copy of a file in memory, for libraries that map what they open.

    safetensors maps its files, and whoever truncates one kills the process that reads on (SIGBUS).
    What was mapped through this path stays valid after it.

    Raises:
        OSError: unreadable, or truncated meanwhile.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        copy = os.memfd_create(path.name)
        try:
            copied = 0
            while copied < size:
                part = os.sendfile(copy, file.fileno(), copied, size - copied)
                if not part:
                    raise OSError(f"{path.name} ends after {copied} of {size} bytes")
                copied += part
            yield f"/proc/self/fd/{copy}"
        finally:
            os.close(copy)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: whole or not at all, and nothing is left beside it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def home() -> Path:
    """`$AWARENESS_HOME`, by default `~/.cache/awareness`."""
    return Path(os.environ.get("AWARENESS_HOME") or Path.home() / ".cache" / "awareness")


def models_dir() -> Path:
    return home() / "models"


def wmatrices_dir() -> Path:
    return home() / "wmatrices"


def geometries_dir() -> Path:
    return home() / "geometries"


def anchors_dir() -> Path:
    return home() / "anchors"


def default_store() -> Path:
    return home() / "store"


def file_digest(path: Path) -> str:
    """sha256 of a whole file, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnsupportedModel(f"cannot read {path}", found=str(error)) from error


def read_text_file(path: Path) -> str:
    """A file's text, line ends as they are.

    Raises:
        BadInput: missing, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read {path}", found=str(error), expected="a UTF-8 text file"
        ) from error
