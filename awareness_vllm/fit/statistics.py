"""Streaming sufficient statistics of the regression from features to target states."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from awareness_vllm.errors import BadInput

BLOCK = 2048
"""Rows of the Gram matrix updated at once: only the upper triangle of blocks is computed."""


@dataclass
class Statistics:
    """Sums over rows of x [F] and y [O], both standardised by a provisional mean and standard
    deviation (`x_mean`, `x_std`, `y_mean`, `y_std`).

    `gram` [F, F] (upper blocks) is in float32; `cross` [F, O] is accumulated, on a CPU, from
    bfloat16 products: their rounding is noise far below the ridge, at one and a half times the
    speed.
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor
    gram: Tensor
    cross: Tensor
    x_sum: Tensor
    y_sum: Tensor
    rows: int = 0

    @classmethod
    def start(cls, x: Tensor, y: Tensor) -> Statistics:
        """Empty statistics, standardised by a first sample of rows [N, F] and [N, O]."""
        x_std, y_std = x.std(0).clamp_min(1e-6), y.std(0).clamp_min(1e-6)
        return cls.empty(x.mean(0), x_std, y.mean(0), y_std)

    @classmethod
    def empty(cls, x_mean: Tensor, x_std: Tensor, y_mean: Tensor, y_std: Tensor) -> Statistics:
        """Statistics of no rows."""
        features, outputs, device = len(x_mean), len(y_mean), x_mean.device
        return cls(
            x_mean=x_mean,
            x_std=x_std,
            y_mean=y_mean,
            y_std=y_std,
            gram=torch.zeros(features, features, device=device),
            cross=torch.zeros(features, outputs, device=device),
            x_sum=torch.zeros(features, device=device),
            y_sum=torch.zeros(outputs, device=device),
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [N, F] and y [N, O], float32."""
        x = (x - self.x_mean) / self.x_std
        y = (y - self.y_mean) / self.y_std
        for begin in range(0, x.shape[1], BLOCK):
            end = begin + BLOCK
            self.gram[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])
        if x.is_cuda:
            self.cross.addmm_(x.T, y)
        else:
            self.cross += x.bfloat16().T @ y.bfloat16()
        self.x_sum += x.sum(0)
        self.y_sum += y.sum(0)
        self.rows += len(x)

    def merge(self, other: Statistics) -> None:
        """Add another process's sums, whatever mean and standard deviation it standardised by."""
        a, b = other.x_std / self.x_std, (other.x_mean - self.x_mean) / self.x_std
        c, d = other.y_std / self.y_std, (other.y_mean - self.y_mean) / self.y_std
        x_sum, y_sum, rows = a * other.x_sum, c * other.y_sum, other.rows
        # With x' = a·x + b: Σ x'x'ᵀ = a Σxxᵀ a + Σax·bᵀ + b·Σaxᵀ + n·b·bᵀ, and so for x'y'ᵀ.
        self.gram += a[:, None] * other.gram * a
        self.gram += torch.outer(x_sum, b) + torch.outer(b, x_sum + rows * b)
        self.cross += a[:, None] * other.cross * c
        self.cross += torch.outer(x_sum, d) + torch.outer(b, y_sum + rows * d)
        self.x_sum += x_sum + rows * b
        self.y_sum += y_sum + rows * d
        self.rows += rows

    def all_reduce(self) -> Statistics:
        """The sums of all processes of the group, the same in each."""
        basis = [self.x_mean, self.x_std, self.y_mean, self.y_std]
        for tensor in (basis := [tensor.clone() for tensor in basis]):
            dist.broadcast(tensor, 0)
        total = Statistics.empty(*basis)
        total.merge(self)
        rows = torch.tensor([total.rows])
        for tensor in (total.gram, total.cross, total.x_sum, total.y_sum, rows):
            dist.all_reduce(tensor)
        total.rows = int(rows)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """All fields but `rows`, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Covariances of x with x [F, F] (upper triangle) and with y [F, O]. Consumes the sums.

        Raises:
            BadInput: fewer rows than half of the features.
        """
        features = len(self.x_sum)
        if self.rows < features // 2:
            raise BadInput(
                "too few anchor tokens",
                found=f"{self.rows} usable tokens",
                expected=f"at least {features // 2} for {features} features",
                remedy="give more anchors, or raise --tokens",
            )
        x_mean, y_mean = self.x_sum / self.rows, self.y_sum / self.rows
        self.gram.div_(self.rows).addr_(x_mean, x_mean, alpha=-1)
        self.cross.div_(self.rows).addr_(x_mean, y_mean, alpha=-1)
        return symmetric(self.gram), self.cross


def symmetric(gram: Tensor) -> Tensor:
    """A matrix of which the upper triangle is right, as a solver needs it: on a CPU it reads that
    alone, on CUDA either."""
    return gram.triu() + gram.triu(1).T if gram.is_cuda else gram
