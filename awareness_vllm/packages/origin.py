"""The origin of a package: captured under this home, signed by a trusted key, or merely claimed.

A package's bytes match its ID whoever made them. Whether its states are those of its text can only
be told by whoever computed them: `publish` seals what it writes with a key that stays in
`$AWARENESS_HOME`. Whoever reads that key can seal, so it is as private as the home's owner.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import logging
import os
import secrets
from pathlib import Path
from typing import Literal

from awareness_vllm.files import atomic_write, draft_file, home
from awareness_vllm.tensor_file import FileRefused, opened

logger = logging.getLogger(__name__)

Origin = Literal["own", "signed", "claimed"]
"""Captured under this home; signed by a key that the operator trusts; nothing but its own word."""
KEY_BYTES = 32


def seal(path: Path, digest: str) -> None:
    """Write the seal beside a package whose file has this sha256. Without a home to keep a key in
    there is none, and the package is like a stranger's."""
    if home_key(home()) is None:
        return
    try:
        with atomic_write(seal_path(path)) as draft:
            draft.write_text(signature(digest))
    except OSError as error:
        logger.warning("%s is not sealed: %s", path.name, error)


def is_own(path: Path, digest: str) -> bool:
    """Whether a package whose file has this sha256 bears this home's seal."""
    if home_key(home()) is None:
        return False
    try:
        with opened(seal_path(path), limit=64) as (file, _):
            found = file.read(64)
    except (FileRefused, OSError):
        return False
    return hmac.compare_digest(found, signature(digest).encode())


def seal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")


@functools.cache
def home_key(folder: Path) -> bytes | None:
    """The key of a home, made at its first use; None where it cannot be kept."""
    path = folder / "seal.key"
    try:
        if not path.exists():
            _make_key(path)
        with opened(path, limit=KEY_BYTES) as (file, size):
            if size == KEY_BYTES:
                return file.read(KEY_BYTES)
        logger.warning("%s is no key of %d bytes", path, KEY_BYTES)
    except (FileRefused, OSError) as error:
        logger.warning("captures are not sealed: %s", error)
    return None


def _make_key(path: Path) -> None:
    """Write a new key, unless another process was faster. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_file(path.parent) as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)


def signature(text: str) -> str:
    """The signature of a text with the home's key, in hex; without a home anybody can make it."""
    return hmac.digest(home_key(home()) or b"", text.encode(), "sha256").hex()
