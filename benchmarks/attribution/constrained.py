"""Maps with and without the constraints on the regression, all from the same sums over anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attribution.constraints import Block
from awareness_vllm.fit.solve import RIDGE_TARGETS, RIDGES, leading_right_vectors
from awareness_vllm.fit.statistics import Statistics


@dataclass(frozen=True)
class Scaling:
    """What standardises features [F] and targets [O]: their means over the anchors, and scales."""

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor


@dataclass(frozen=True)
class ConstrainedMap:
    """One regression: `solution` [F, O] between standardised features and targets. `span` [O, R] is
    what the best map of a limited rank keeps of its fitted values, in the metric of `weight` [O].
    """

    scaling: Scaling
    weight: Tensor
    solution: Tensor
    span: Tensor
    ridge: float

    def states(self, features: Tensor, masked: Tensor, width: int) -> Tensor:
        """Target states [T, O] at full rank, keys position-free.

        Args:
            features: [T, F], the source's `width` states first.
            blank: [T] bool, rows whose source states say nothing.
        """
        by = self.scaling
        x = (features - by.x_mean) / by.x_std
        x[masked.nonzero()[:, 0], :width] = 0
        return by.y_mean + x @ self.solution * by.y_std

    def reduced(self, states: Tensor) -> Tensor:
        """What the map of limited rank would give in place of its states at full rank, [T, O]."""
        by = self.scaling
        metric = self.weight / by.y_std
        fitted = (states - by.y_mean) * metric
        return by.y_mean + fitted @ self.span @ self.span.T / metric


@dataclass(frozen=True)
class Regression:
    """The sums over anchors, centred: `gram` [F, F] and `cross` [F, O] of standardised features
    and targets, with held-out rows `x` [N, F] and `y` [N, O], standardised alike."""

    scaling: Scaling
    gram: Tensor
    cross: Tensor
    weight: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, sums: Statistics, held_out: tuple[Tensor, Tensor], weight: Tensor) -> Regression:
        """From the sums, which are consumed, rows [N, F] and [N, O] of held-out documents, and the
        importance of each standardised target, [O]."""
        x_mean = sums.x_mean + sums.x_std * sums.x_sum / sums.rows
        y_mean = sums.y_mean + sums.y_std * sums.y_sum / sums.rows
        gram, cross = sums.covariances()
        gram = gram.triu_().add_(gram.triu(1).T)
        x, y = held_out
        return cls(
            scaling=Scaling(x_mean, sums.x_std, y_mean, sums.y_std),
            gram=gram,
            cross=cross,
            weight=weight,
            x=(x - x_mean) / sums.x_std,
            y=(y - y_mean) / sums.y_std,
        )

    def solution(self, blocks: Sequence[Block], ridge: float) -> Tensor:
        """The ridge's solution [F, O], each of the blocks by its own features; zero elsewhere."""
        found = torch.zeros_like(self.cross)
        for block in blocks:
            merge, columns = block.merge, block.columns
            gram = merge.T @ (merge.T @ self.gram).T.contiguous()
            gram.diagonal().add_(ridge)
            factor = torch.linalg.cholesky(gram, upper=True)
            cross = merge.T @ self.cross[:, columns]
            found[:, columns] = merge @ torch.cholesky_solve(cross, factor, upper=True)
        return found

    def choose_ridge(self, blocks: Sequence[Block]) -> float:
        """The ridge of RIDGES that explains the held-out rows best. Some of the targets, evenly
        spread over all blocks, stand for all of them."""
        step = max(1, len(self.weight) // RIDGE_TARGETS)
        some = [replace(block, columns=block.columns[::step]) for block in blocks]
        columns = torch.cat([block.columns for block in some])

        def error(ridge: float) -> float:
            left = self.y[:, columns] - self.x @ self.solution(some, ridge)[:, columns]
            return (left * self.weight[columns]).square().mean().item()

        return min(RIDGES, key=error)

    def solve(self, blocks: Sequence[Block], rank: int, seed: int = 0) -> ConstrainedMap:
        """The map by these blocks, and the span of its best approximation of that rank: as in
        `reduced_rank_ridge`, in the metric of the features' covariance plus ridge."""
        ridge = self.choose_ridge(blocks)
        solution = self.solution(blocks, ridge)
        gram = self.gram.clone()
        gram.diagonal().add_(ridge)
        half = torch.linalg.cholesky(gram, upper=True) @ solution
        return ConstrainedMap(
            scaling=self.scaling,
            weight=self.weight,
            solution=solution,
            span=leading_right_vectors(half.mul_(self.weight), rank, seed),
            ridge=ridge,
        )
