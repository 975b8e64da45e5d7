"""How a W-Matrix is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FitConfig:
    """`tokens` of anchors (target tokens), how many source `layers` are read (None: half) and by
    which `choice` ("spread" evenly, the "best", or those with "full" attention), latent `rank`,
    `ridge` as a share of unit variance (None: chosen on held-out documents), how many
    `predecessors` of a token lend their embeddings (None: not even the token itself, for packages
    without text); `calibration` texts, `batch` of them a step, gone through `epochs` times with a
    relative step `rate`, until `patience` epochs bring nothing better on held-out documents."""

    tokens: int = 45_000
    layers: int | None = None
    choice: Literal["spread", "best", "full"] = "spread"
    rank: int = 576
    ridge: float | None = None
    predecessors: int | None = 3
    calibration: int = 160
    batch: int = 1
    epochs: int = 1
    rate: float = 3e-3
    patience: int = 3
    held_out: float = 0.05
    seed: int = 0
