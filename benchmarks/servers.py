"""Servers of benchmarks, stock vLLM or `awareness serve`, and ratios within one run."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from awareness_demo.models import prepare

FLAGS = ["--enforce-eager", "--kv-cache-memory-bytes", "1G", "--max-model-len", "2048"]
ALIGNED = ["--editions", "never"]
"""Of servers whose aligned memories are measured: an edition would take their place."""
BOOTSTRAPS = 2000


def paired_ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Median of one / other by pairs, and its 95 % bootstrap interval."""
    pairs = np.array(one) / np.array(other)
    draws = np.random.default_rng(0).choice(pairs, (BOOTSTRAPS, len(pairs)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    interval = [round(float(low), 4), round(float(high), 4)]
    return {"ratio": round(float(np.median(pairs)), 4), "interval": interval}


def stop_on_terminate() -> None:
    """Let SIGTERM end this program by an exception, so that no server stays behind."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def smollm2() -> Path:
    """The model folder of SmolLM2, prepared if it is missing."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        return prepare()["smollm2-135m"]
