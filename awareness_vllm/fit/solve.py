"""Reduced-rank ridge regression from sufficient statistics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.fit.statistics import Statistics, symmetric

RIDGES = (0.002, 0.007, 0.02, 0.07)
"""Candidate ridges, rising: shares of the features' unit variance."""
RIDGE_TARGETS = 256
"""Target dims, drawn at random, on which the ridge is chosen."""
OVERSAMPLING = 32
"""Columns beyond the rank in the subspace iteration, which make its last ones accurate."""


def reduced_rank_ridge(
    statistics: Statistics, rank: int, ridge: float, weight: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The map of limited rank that minimises the weighted squared error plus ridge.

    With G the features' covariance, C the covariance with the targets and L Lᵀ = G + ridge·I, the
    full solution is L⁻ᵀ (L⁻¹ C); its best approximation of a given rank in the fitted values'
    metric keeps the leading right singular vectors of (L⁻¹ C)·weight (Izenman 1975).

    Args:
        statistics: sums over the anchors; consumed.
        rank: R, the width of the latent.
        ridge: share of the features' unit variance.
        weight: [O], importance of each standardised target.

    Returns:
        encode [F, R] for standardised features, decode [R, O] and bias [O] in the targets' units.
    """
    gram, cross = statistics.covariances()
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram, upper=True)
    half = torch.linalg.solve_triangular(factor.T, cross, upper=False)
    basis = leading_right_vectors(half * weight, rank, seed)
    encode = torch.linalg.solve_triangular(factor, half @ (weight[:, None] * basis), upper=True)
    decode = basis.T / weight * statistics.y_std
    x_mean = statistics.x_sum / statistics.rows
    y_mean = statistics.y_mean + statistics.y_std * statistics.y_sum / statistics.rows
    return encode, decode, y_mean - x_mean @ encode @ decode


def choose_ridge(
    statistics: Statistics, x: Tensor, y: Tensor, weight: Tensor, seed: int = 0
) -> float:
    """The ridge of `RIDGES` that predicts rows of held-out documents best.

    It is chosen by the full solution of some target dims: a ridge is about the features.

    Args:
        statistics: sums over the anchors; not consumed.
        x, y: rows [N, F] and [N, O] of held-out documents.
        weight: [O], importance of each standardised target.
    """
    rows = statistics.rows
    some = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))[
        :RIDGE_TARGETS
    ].to(weight.device)
    x_mean, y_mean = statistics.x_sum / rows, statistics.y_sum[some] / rows
    gram = symmetric((statistics.gram / rows).addr_(x_mean, x_mean, alpha=-1))
    cross = (statistics.cross[:, some] / rows).addr_(x_mean, y_mean, alpha=-1)
    x = (x - statistics.x_mean) / statistics.x_std - x_mean
    y = (y[:, some] - statistics.y_mean[some]) / statistics.y_std[some] - y_mean
    errors: dict[float, float] = {}
    for ridge, step in zip(RIDGES, np.diff(RIDGES, prepend=0.0), strict=True):
        gram.diagonal().add_(float(step))
        solution = torch.cholesky_solve(cross, torch.linalg.cholesky(gram, upper=True), upper=True)
        errors[ridge] = ((y - x @ solution) * weight[some]).square().mean().item()
    return min(errors, key=errors.__getitem__)


def round_trip_error(gram: Tensor, encode: Tensor) -> float:
    """The mean squared error of standardised features that are restored from the latent.

    The best linear map from latent z = xE to features is (EᵀGE)⁻¹ EᵀG, which leaves
    tr G − tr (EᵀGE)⁻¹ EᵀG·GE of the variance tr G.

    Args:
        gram: [F, F], the features' covariance; its upper triangle is read.
        encode: [F, R].

    Returns:
        a share of the variance, from 0 to 1.
    """
    mapped = gram.triu() @ encode + gram.triu(1).T @ encode
    restored = torch.linalg.solve(encode.T @ mapped, mapped.T @ mapped).trace()
    return 1 - (restored / gram.trace()).item()


def leading_right_vectors(matrix: Tensor, rank: int, seed: int, iterations: int = 2) -> Tensor:
    """Right singular vectors of a matrix [M, N] with the largest singular values, [N, rank].

    Subspace iteration from a random start (Halko et al., arXiv 0909.4061), orthonormalised by
    Cholesky: torch.svd_lowrank, with Householder QR, takes several times as long at rank 2,048.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator)
    basis = _orthonormal(start.to(matrix.device))
    for _ in range(iterations):
        basis = _orthonormal(matrix.T @ _orthonormal(matrix @ basis))
    projected = matrix @ basis
    _, vectors = torch.linalg.eigh(projected.T @ projected)
    return basis @ vectors[:, -rank:]


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, by Cholesky in two passes for stability; by QR,
    which is slower, where columns depend on each other."""
    basis = columns
    for _ in range(2):
        gram = basis.T @ basis
        gram.diagonal().add_(1e-7 * gram.diagonal().mean())
        factor, _ = torch.linalg.cholesky_ex(gram, upper=True)
        basis = torch.linalg.solve_triangular(factor, basis, upper=True, left=False)
    independent = (basis.norm(dim=0) - 1).abs().max() < 1e-2  # not so where it is NaN
    return basis if independent else torch.linalg.qr(columns).Q
