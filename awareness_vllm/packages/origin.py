"""The origin of a package: captured under this home, signed by a trusted key, or merely claimed.

A package's bytes match its ID whoever made them. Whether its states are those of its text can only
be told by whoever computed them: `publish` leaves a seal of what it writes in `$AWARENESS_HOME`,
made with a key that stays there. Whoever reads that key can seal, too.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import logging
import secrets
from pathlib import Path
from typing import Literal

from awareness_vllm.files import atomic_write, home, write_new
from awareness_vllm.tensor_file import FileRefused, opened

logger = logging.getLogger(__name__)

Origin = Literal["own", "signed", "claimed"]
"""Captured under this home; signed by a key that the operator trusts; nothing but its own word."""
KEY_BYTES = 32


def seal(digest: str) -> None:
    """Note that a package whose file has this sha256 was captured under this home. Where the home
    cannot be written to, the package is like a stranger's."""
    if home_key(home()) is None:
        return
    try:
        seals_dir().mkdir(exist_ok=True)
        with atomic_write(seals_dir() / digest) as draft:
            draft.write_text(signature(digest))
    except OSError as error:
        logger.warning("mem_%s is not sealed: %s", digest[:32], error)


def is_own(digest: str) -> bool:
    """Whether a package whose file has this sha256 was captured under this home."""
    if home_key(home()) is None:
        return False
    try:
        with opened(seals_dir() / digest, limit=64) as (file, _):
            found = file.read(64)
    except (FileRefused, OSError):
        return False
    return hmac.compare_digest(found, signature(digest).encode())


def seals_dir() -> Path:
    return home() / "seals"


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
    with contextlib.suppress(FileExistsError):
        write_new(path, secrets.token_bytes(KEY_BYTES), 0o600)


def signature(text: str) -> str:
    """The signature of a text with the home's key, in hex; without a home anybody can make it."""
    return hmac.digest(home_key(home()) or b"", text.encode(), "sha256").hex()
