"""awareness-vllm: load the KV cache of one model into a vLLM server of another.

Importing this package loads neither torch nor vllm; its classes are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awareness_vllm.aligners.aligner import KVCacheAligner
    from awareness_vllm.aligners.multihop import MultiHopAligner, MultiHopMemoryAligner
    from awareness_vllm.compatibility.checker import MemoryCompatibilityChecker
    from awareness_vllm.compatibility.wmatrices import CompatibilityChecker

__all__ = [
    "CompatibilityChecker",
    "KVCacheAligner",
    "MemoryCompatibilityChecker",
    "MultiHopAligner",
    "MultiHopMemoryAligner",
]
__version__ = "0.1.0"

HOMES = {
    "CompatibilityChecker": "awareness_vllm.compatibility.wmatrices",
    "KVCacheAligner": "awareness_vllm.aligners.aligner",
    "MemoryCompatibilityChecker": "awareness_vllm.compatibility.checker",
    "MultiHopAligner": "awareness_vllm.aligners.multihop",
    "MultiHopMemoryAligner": "awareness_vllm.aligners.multihop",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
