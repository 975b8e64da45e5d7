"""Files of the product: where they are, atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from awareness_vllm.errors import BadInput, UnsupportedModel


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; that file takes the place of `path` when the block ends,
    and is removed where the block fails."""
    with draft_file(path.parent) as draft:
        yield draft
        draft.chmod(0o644)
        os.replace(draft, path)


@contextlib.contextmanager
def draft_file(folder: Path) -> Iterator[Path]:
    """A new path in a folder; what is still there when the block ends is removed."""
    draft = folder / f".draft-{uuid.uuid4().hex}"
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


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
