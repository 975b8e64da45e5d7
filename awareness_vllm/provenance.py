"""Hardware and library versions, recorded beside everything that is made or measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def hardware() -> str:
    """The number of cores and the processor's name (of its architecture where unknown)."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{os.cpu_count()} × {name}"


def versions() -> dict[str, str]:
    """Versions of the libraries whose numerics decide a result, by name."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
