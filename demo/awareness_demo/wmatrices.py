"""W-Matrices that the demo, the tests and the benchmarks left at home."""

from __future__ import annotations

from pathlib import Path

from awareness_vllm.errors import WMatrixCorrupt
from awareness_vllm.wmatrix.manifest import read_manifest


def is_readable(path: Path) -> bool:
    """Whether a file is a W-Matrix of a format that this version reads."""
    try:
        read_manifest(path)
    except WMatrixCorrupt:
        return False
    return True
