"""Which source layers to read: those without which the regression would lose most."""

from __future__ import annotations

import torch
from torch import Tensor

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.models.geometry import Geometry


def evenly_spread(count: int | None, total: int) -> tuple[int, ...]:
    """So many of a model's layers (half by default), evenly spread, the last one among them.

    Neighbouring layers say much the same: every other one does nearly what all do, at half the
    price (docs/fidelity-log.md).
    """
    count = max(1, total // 2) if count is None else min(count, total)
    return tuple((i + 1) * total // count - 1 for i in range(count))


def without_window(count: int | None, source: Geometry) -> tuple[int, ...]:
    """So many of the layers that hold every token's states, evenly spread: from them a map gives
    what layers with a window no longer hold.

    Raises:
        UnsupportedModel: every layer has a window.
    """
    full = [i for i, layer in enumerate(source.layers) if layer.window is None]
    if not full:
        windows = sorted({layer.window for layer in source.layers if layer.window})
        raise UnsupportedModel(
            f"{source.name} has windows, and no full layer to expand them from",
            found=f"windows of {windows} in all layers",
            expected="a layer with full attention",
            remedy="capture with transformers, which keeps all states, and read any layers "
            "(--choice spread)",
        )
    return tuple(full[i] for i in evenly_spread(count, len(full)))


class Elimination:
    """Backward elimination of source layers from the sums over all of them.

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
        gram, cross = statistics.centred()
        gram.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram, upper=True)
        self.inverse = torch.cholesky_inverse(factor, upper=True)
        self.solution = torch.cholesky_solve(cross * weight, factor, upper=True)
        self.features = {i: columns(source, i) for i in range(len(source.layers))}
        self.lost = 0.0

    def cost(self, layer: int) -> float:
        """How much the weighted squared error per row grows without a layer."""
        mine = self.features[layer]
        rows = self.solution[mine]
        return (rows * torch.linalg.solve(self.inverse[mine][:, mine], rows)).sum().item()

    def drop(self, layer: int) -> None:
        """Leave a layer out."""
        self.lost += self.cost(layer)
        mine = self.features.pop(layer)
        share = torch.linalg.solve(self.inverse[mine][:, mine], self.inverse[mine]).T
        self.solution -= share @ self.solution[mine].clone()
        self.inverse -= share @ self.inverse[mine].clone()

    def keep(self, count: int) -> tuple[int, ...]:
        """Drop the cheapest layer until so many are left; those."""
        while len(self.features) > count:
            self.drop(min(self.features, key=self.cost))
        return tuple(sorted(self.features))


def columns(source: Geometry, layer: int) -> Tensor:
    """Where a layer's keys and values stand among the features of all layers."""
    widths = [g.width for g in source.layers]
    begin, width = sum(widths[:layer]), widths[layer]
    keys = torch.arange(begin, begin + width)
    return torch.cat((keys, keys + sum(widths)))
