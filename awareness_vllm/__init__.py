"""awareness-vllm: load the KV cache of one model into a vLLM server of another.

Importing this package loads neither torch nor vllm; its classes are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awareness_vllm.aligners.aligner import KVCacheAligner
    from awareness_vllm.compatibility.memory_checker import MemoryCompatibilityChecker
    from awareness_vllm.compatibility.pair_checker import CompatibilityChecker
    from awareness_vllm.evaluate.monitor import WMatrixMonitor
    from awareness_vllm.fit.trainer import WMatrixTrainer
    from awareness_vllm.marketplace.market import Marketplace
    from awareness_vllm.published import MultiHopAligner, MultiHopMemoryAligner

__all__ = [
    "CompatibilityChecker",
    "KVCacheAligner",
    "Marketplace",
    "MemoryCompatibilityChecker",
    "MultiHopAligner",
    "MultiHopMemoryAligner",
    "WMatrixMonitor",
    "WMatrixTrainer",
]
__version__ = "0.1.0"

MODULES = {
    "CompatibilityChecker": "compatibility.pair_checker",
    "KVCacheAligner": "aligners.aligner",
    "Marketplace": "marketplace.market",
    "MemoryCompatibilityChecker": "compatibility.memory_checker",
    "MultiHopAligner": "published",
    "MultiHopMemoryAligner": "published",
    "WMatrixMonitor": "evaluate.monitor",
    "WMatrixTrainer": "fit.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
