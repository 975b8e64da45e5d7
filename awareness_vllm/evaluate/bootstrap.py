"""Means and ratios over documents with 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from awareness_vllm.errors import BadInput


def retention(native: np.ndarray, memory: np.ndarray, none: np.ndarray) -> dict[str, float]:
    """(NLL_none − NLL_memory) / (NLL_none − NLL_native) of NLLs [n], with its interval."""
    return share(none - memory, none - native)


def share(gained: np.ndarray, possible: np.ndarray) -> dict[str, float]:
    """The ratio of two sums over documents [n], with its interval.

    Raises:
        BadInput: every possible gain is 0.
    """
    if not possible.any():
        raise BadInput(
            "shares of native cannot be computed",
            found="a native arm that is no better than none",
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


def margin(
    gained: np.ndarray, controls: Sequence[np.ndarray], possible: np.ndarray
) -> dict[str, float]:
    """The share of a plan less that of the best of its controls, with its interval.

    It is of paired differences: a sample draws documents whole. Which control is the best is
    decided in each sample, so a plan gains nothing by which of two equal ones happened to be worse.

    Args:
        gained: [n]; `controls`: of [n]; `possible`: [n], as for `share`.
    """
    means = [share(gained - control, possible)["mean"] for control in controls]
    picks = resamples(len(gained))
    total = possible[picks].sum(1)
    differences = np.stack([(gained - control)[picks].sum(1) for control in controls])
    least = differences.min(0)[total != 0] / total[total != 0]
    low, high = np.quantile(least, (0.025, 0.975))
    least_mean = min(means)
    return {
        "mean": least_mean,
        "ci_low": min(least_mean, float(low)),
        "ci_high": max(least_mean, float(high)),
    }


def mean(values: np.ndarray) -> dict[str, float]:
    """The mean of values [n] over documents, with its interval."""
    return share(values, np.ones(len(values)))


def resamples(count: int, draws: int = 2000) -> np.ndarray:
    """Indices of bootstrap samples, [draws, count], by a fixed seed."""
    return np.random.default_rng(0).integers(0, count, (draws, count))
