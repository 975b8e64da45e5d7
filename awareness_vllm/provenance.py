"""On which machine, and with which versions, something was made or measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def hardware() -> str:
    """Cores and the processor's name, where the system tells it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{os.cpu_count()} × {name}"


def versions() -> dict[str, str]:
    """Of the libraries whose numerics decide a result."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
