"""The KV connector that vLLM loads by this module's path (`kv_connector_module_path`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awareness_vllm.serving.connector.connector import AwarenessConnector

__all__ = ["AwarenessConnector"]


def __getattr__(name: str) -> Any:
    # Late: parts of this package are read where vLLM is not installed.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from awareness_vllm.serving.connector import connector

    return getattr(connector, name)
