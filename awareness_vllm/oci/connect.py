"""The repository that a reference names: a folder, or one in a registry."""

from __future__ import annotations

import os
from pathlib import Path

from awareness_vllm.oci.layout import Layout
from awareness_vllm.oci.reference import KEY, Reference, default_registry
from awareness_vllm.oci.repository import Repository


def open_repository(
    where: str | Path | Reference,
    *,
    api_key: str | None = None,
    timeout: tuple[float, float] | None = None,
) -> Repository:
    """The repository of a reference.

    Args:
        api_key: a registry's token, or "user:password". By default that of the environment, if the
            registry is the environment's; or else docker's own configuration says how to log in.
        timeout: seconds to wait for a registry's connection, and for its next bytes.

    Raises:
        BadInput: not a reference.
    """
    reference = where if isinstance(where, Reference) else Reference.parse(where)
    if reference.host is None:
        return Layout(reference)
    if api_key is None and reference.host == Reference.parse(default_registry()).host:
        api_key = os.environ.get(KEY) or None
    # Late: it needs requests, and a folder does not.
    from awareness_vllm.oci.remote import Remote
    from awareness_vllm.oci.session import TIMEOUT

    return Remote(reference, api_key=api_key, timeout=timeout or TIMEOUT)
