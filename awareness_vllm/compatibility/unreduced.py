"""What a map's rank leaves out: what a regression without a latent says beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.wmatrix.config import FitConfig
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.gather import gather
from awareness_vllm.wmatrix.reader import Reader, Row
from awareness_vllm.wmatrix.regress import CHOICE_RIDGE, fisher_weight
from awareness_vllm.wmatrix.statistics import Statistics
from awareness_vllm.wmatrix.workspace import workspace


@dataclass(frozen=True)
class Unreduced:
    """The full regression from the features to target states, its part outside of what a map's
    latent can express: `mean` and `scale` [F] standardise features, `solution` is [F, O]. Learned
    from `rows` tokens."""

    mean: Tensor
    scale: Tensor
    solution: Tensor
    rows: int

    def beyond(self, row: Row) -> Tensor:
        """What it adds to a map's states of one text, [T, O]; nothing where the source says
        nothing."""
        found = ((row.features - self.mean) * self.scale) @ self.solution
        return found.masked_fill(row.blank[:, None], 0)


def unreduced(
    reader: Reader,
    wmatrix: WMatrix,
    anchors: Sequence[Document],
    tokens: int,
    *,
    progress: bool = True,
) -> Unreduced:
    """Read so many tokens of anchors and solve for what the map's rank leaves out.

    Args:
        reader: reads the layers that the map reads.
    """
    ridge = wmatrix.manifest.fit.get("ridge")
    config = FitConfig(tokens=tokens, predecessors=reader.predecessors)
    with workspace(None, "unreduced") as work:
        statistics = gather(reader, anchors, config, work, progress=progress)
    weight = fisher_weight(reader, anchors, statistics, config, progress=progress)
    ridge = float(ridge) if ridge else CHOICE_RIDGE  # a folded map was not fitted with one
    return outside(statistics, wmatrix.decode.float(), weight, ridge)


def outside(statistics: Statistics, decode: Tensor, weight: Tensor, ridge: float) -> Unreduced:
    """The ridge's full solution without what lies in the decoder's span.

    A calibrated map's states lie in that span as well, around its bias, so that only the limit of
    the rank is lifted and calibration stays. The span is taken off orthogonally by the Fisher
    information: errors within and outside of it then cost what they cost apart.

    Args:
        statistics: sums over the anchors; consumed.
        decode: [R, O].
        weight: [O], importance of each standardised target.
    """
    rows, scale = statistics.rows, 1 / statistics.x_scale
    mean = statistics.x_mean + statistics.x_scale * statistics.x_sum / rows
    gram, cross = statistics.centred()
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram, upper=True)
    weighted = torch.cholesky_solve(cross, factor, upper=True) * weight
    metric = weight / statistics.y_scale
    span = torch.linalg.qr((decode * metric).T).Q
    weighted -= (weighted @ span) @ span.T
    return Unreduced(mean, scale, weighted / metric, rows)
