"""The secret of a server's processes, with which they sign load plans."""

from __future__ import annotations

import os
import secrets

SECRET = "AWARENESS_SECRET"
"""An environment variable: vLLM's processes start each other and inherit it."""


def secret() -> bytes:
    """The server's secret, made by whichever of its processes asks first."""
    return os.environ.setdefault(SECRET, secrets.token_hex(32)).encode()
