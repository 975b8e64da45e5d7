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
    """Means and standard deviations of features [F] and targets [O] over the anchors."""

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor


@dataclass(frozen=True)
class ConstrainedMap:
    """One regression: its `solution` [F, O] between standardised features and targets. `span` [O,
    R] is a basis of the fitted values of the best map of limited rank, in the metric of `weight`
    [O].
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
            masked: [T] bool, rows whose source states are masked.
        """
        by = self.scaling
        x = (features - by.x_mean) / by.x_std
        x[masked.nonzero()[:, 0], :width] = 0
        return by.y_mean + x @ self.solution * by.y_std

    def reduced(self, states: Tensor) -> Tensor:
        """The target states [T, O] of limited rank for those at full rank."""
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
        """The regression of sums, which are consumed, with held-out rows [N, F] and [N, O] and the
        importance [O] of each standardised target."""
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
        """The ridge's solution [F, O], each block by its own features; zero elsewhere."""
        solution = torch.zeros_like(self.cross)
        for block in blocks:
            merge, columns = block.merge, block.columns
            gram = merge.T @ (merge.T @ self.gram).T.contiguous()
            gram.diagonal().add_(ridge)
            factor = torch.linalg.cholesky(gram, upper=True)
            cross = merge.T @ self.cross[:, columns]
            solution[:, columns] = merge @ torch.cholesky_solve(cross, factor, upper=True)
        return solution

    def choose_ridge(self, blocks: Sequence[Block]) -> float:
        """The ridge of RIDGES that predicts the held-out rows best, by some targets of all
        blocks."""
        step = max(1, len(self.weight) // RIDGE_TARGETS)
        some = [replace(block, columns=block.columns[::step]) for block in blocks]
        columns = torch.cat([block.columns for block in some])

        def error(ridge: float) -> float:
            left = self.y[:, columns] - self.x @ self.solution(some, ridge)[:, columns]
            return (left * self.weight[columns]).square().mean().item()

        return min(RIDGES, key=error)

    def solve(self, blocks: Sequence[Block], rank: int, seed: int = 0) -> ConstrainedMap:
        """The map of these blocks, with the span of its best approximation of that rank in the
        metric of the features' covariance plus ridge, as in `reduced_rank_ridge`."""
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
