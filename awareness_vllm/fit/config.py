"""The configuration of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FitConfig:
    """The fit's parameters: anchor `tokens` of the target; the number of source `layers` to read
    (None: half) and their `choice` ("spread" evenly, the "best", or those with "full" attention);
    the latent's `rank`; the `ridge` as a share of unit variance (None: chosen on held-out
    documents); the `predecessors` of a token whose embeddings are features too (None: no
    embeddings at all, for packages without text); calibration on `calibration` texts in steps of
    `batch`, for `epochs` with a relative `rate`, ended by `patience` epochs without a better score
    on the `held_out` share of documents."""

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
