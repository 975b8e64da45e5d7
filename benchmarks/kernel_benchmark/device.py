"""The device that is timed: whether it is CUDA's, what is free on it, what it is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from awareness_vllm.provenance import hardware

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free_memory() -> int:
    """Bytes that are free on the device; all that a machine without one has."""
    if not CUDA:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def lacking(bytes_: int) -> str:
    """Why so many bytes cannot be had; empty where they can."""
    free = free_memory()
    return f"needs {bytes_ / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if bytes_ > free else ""


def machine() -> dict[str, Any]:
    """Hardware and versions; nulls where there is no such thing."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None,
        "cuda": torch.version.cuda,
        "driver": None,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    device = None
    if CUDA:
        device = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB"
        # torch knows which CUDA the driver serves; the driver's own version is the kernel's to say.
        driver = [f"for CUDA {torch._C._cuda_getDriverVersion()}"]
        module = Path("/proc/driver/nvidia/version")
        if module.is_file():
            driver += module.read_text().splitlines()[:1]
        versions["driver"] = "; ".join(driver)
    return {"hardware": hardware(), "device": device, "versions": versions}
