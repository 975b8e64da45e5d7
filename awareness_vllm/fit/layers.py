"""The choice of the source layers that a map reads."""

from __future__ import annotations

import torch
from torch import Tensor

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.features import state_columns


def spread_layers(count: int | None, total: int) -> tuple[int, ...]:
    """`count` of a model's `total` layers (half by default), evenly spread, with the last one.

    Neighbouring layers are much alike: every other one is nearly as good as all of them, at half
    the cost (docs/fidelity-log.md).
    """
    count = max(1, total // 2) if count is None else min(count, total)
    return tuple((i + 1) * total // count - 1 for i in range(count))


def full_layers(count: int | None, source: Geometry) -> tuple[int, ...]:
    """`count` of the layers with full attention, evenly spread: they have the states of all tokens,
    also where sliding windows have lost some.

    Raises:
        UnsupportedModel: every layer has a window.
    """
    full = [i for i, layer in enumerate(source.layers) if layer.window is None]
    if not full:
        windows = sorted({layer.window for layer in source.layers if layer.window})
        raise UnsupportedModel(
            f"{source.name} has no layer with full attention",
            found=f"sliding windows of {windows} tokens in all layers",
            expected="a layer with full attention",
            remedy="capture with transformers, which keeps all states, and read any layers "
            "(--choice spread)",
        )
    return tuple(full[i] for i in spread_layers(count, len(full)))


class Elimination:
    """Backward elimination of source layers, from the sums over all of them.

    With P the inverse of the ridge's matrix and β = P·C the solution, leaving out the features b
    raises the minimised error by exactly tr βᵦᵀ (Pᵦᵦ)⁻¹ βᵦ; the solution without them follows from
    the same parts.

    Args:
        statistics: sums over rows whose features begin with all the source's layers; consumed.
        weight: [O], importance of each standardised target.
        ridge: share of the features' unit variance.
    """

    def __init__(
        self, statistics: Statistics, source: Geometry, weight: Tensor, ridge: float
    ) -> None:
        gram, cross = statistics.covariances()
        gram.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram, upper=True)
        self.inverse = torch.cholesky_inverse(factor, upper=True)
        self.solution = torch.cholesky_solve(cross * weight, factor, upper=True)
        self.features = {i: state_columns(source, [i]) for i in range(len(source.layers))}

    def cost(self, layer: int) -> float:
        """The growth of the weighted squared error per row without a layer."""
        own = self.features[layer]
        rows = self.solution[own]
        return (rows * torch.linalg.solve(self.inverse[own][:, own], rows)).sum().item()

    def drop(self, layer: int) -> None:
        """Leave a layer out."""
        own = self.features.pop(layer)
        share = torch.linalg.solve(self.inverse[own][:, own], self.inverse[own]).T
        self.solution -= share @ self.solution[own].clone()
        self.inverse -= share @ self.inverse[own].clone()

    def keep(self, count: int) -> tuple[int, ...]:
        """The `count` layers that are left after dropping the cheapest one again and again."""
        while len(self.features) > count:
            self.drop(min(self.features, key=self.cost))
        return tuple(sorted(self.features))
