"""Means and ratios over documents, with bootstrap intervals over documents."""

from __future__ import annotations

import numpy as np

from awareness_vllm.errors import BadInput


def retention(native: np.ndarray, memory: np.ndarray, none: np.ndarray) -> dict[str, float]:
    """(NLL_none − NLL_memory) / (NLL_none − NLL_native), its interval over documents."""
    return share(none - memory, none - native)


def share(gained: np.ndarray, possible: np.ndarray) -> dict[str, float]:
    """The ratio of two sums over documents, with a 95 % bootstrap interval over documents.

    Raises:
        BadInput: nothing could be gained at all.
    """
    if not possible.any():
        raise BadInput(
            "there is nothing to measure against",
            found="the native arm is no better than none",
            expected="texts or facts that the target profits from reading",
        )
    picks = resamples(len(gained))
    total = possible[picks].sum(1)
    ratios = gained[picks].sum(1)[total != 0] / total[total != 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {
        "mean": float(gained.mean() / possible.mean()),
        "ci_low": float(low),
        "ci_high": float(high),
    }


def mean(values: np.ndarray) -> dict[str, float]:
    """A mean over documents with its 95 % bootstrap interval."""
    return share(values, np.ones(len(values)))


def resamples(count: int, draws: int = 2000) -> np.ndarray:
    """Indices of a bootstrap's draws, [draws, count]; always the same ones."""
    return np.random.default_rng(0).integers(0, count, (draws, count))
