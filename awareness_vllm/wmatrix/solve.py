"""Reduced-rank ridge regression from sufficient statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from awareness_vllm.wmatrix.statistics import Statistics


def reduced_rank_ridge(
    statistics: Statistics, rank: int, ridge: float, weight: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The rank-limited map that minimises the weighted squared error plus ridge.

    With G the features' covariance, C the covariance with the targets and L Lᵀ = G + ridge·I, the
    full solution is L⁻ᵀ (L⁻¹ C); its best approximation of a given rank in the fitted values'
    metric keeps the leading right singular vectors of (L⁻¹ C)·weight (Izenman 1975).

    Args:
        statistics: sums over the anchors; consumed.
        rank: columns of the latent, R.
        ridge: share of the features' unit variance.
        weight: [O], importance of each standardised target.

    Returns:
        encode [F, R] for standardised features, decode [R, O] and bias [O] in the targets' units.
    """
    gram, cross = statistics.centred()
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram, upper=True)
    half = torch.linalg.solve_triangular(factor.T, cross, upper=False)
    torch.manual_seed(seed)
    _, _, basis = torch.svd_lowrank(half * weight, q=rank, niter=4)
    encode = torch.linalg.solve_triangular(factor, half @ (weight[:, None] * basis), upper=True)
    decode = basis.T / weight * statistics.y_scale
    x_mean = statistics.x_sum / statistics.rows
    y_mean = statistics.y_mean + statistics.y_scale * statistics.y_sum / statistics.rows
    return encode, decode, y_mean - x_mean @ encode @ decode
