"""The distance of two models' caches in shape: a simple figure, and no forecast of retention."""

from __future__ import annotations

from statistics import fmean

from awareness_vllm.models.geometry import Geometry, LayerGeometry, by_depth


def structural_mismatch(source: Geometry, target: Geometry) -> float:
    """0 (the same shape) to 1: the mean of six differences.

    Layers and the width of the whole cache count by their relative difference. KV heads, head dim,
    positional scheme and window are compared layer by layer, each target layer with the source
    layer at its depth: heads and dims by relative difference, a scheme by whether it is another
    one, windows by `window_difference`.
    """
    matched = by_depth(len(source.layers), len(target.layers))
    pairs = [(source.layers[i], layer) for i, layer in zip(matched, target.layers, strict=True)]
    differences = [
        relative(len(source.layers), len(target.layers)),
        relative(source.width, target.width),
        fmean(relative(a.heads, b.heads) for a, b in pairs),
        fmean(relative(a.head_dim, b.head_dim) for a, b in pairs),
        fmean(a.positions.scheme != b.positions.scheme for a, b in pairs),
        fmean(window_difference(a, b) for a, b in pairs),
    ]
    return fmean(differences)


def window_difference(source: LayerGeometry, target: LayerGeometry) -> float:
    """The relative difference of two windows; 1 between a window and unlimited attention."""
    if source.window is None or target.window is None:
        return float(source.window != target.window)
    return relative(source.window, target.window)


def relative(a: int, b: int) -> float:
    """The difference of two counts as a share of the larger one."""
    return abs(a - b) / max(a, b)
