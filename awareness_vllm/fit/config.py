"""The configuration of a fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from awareness_vllm.errors import BadInput


@dataclass(frozen=True)
class Deadlines:
    """Times, by `time.monotonic`, at which reading anchors and calibrating end with what there is;
    None where they end by their own counts. They are no part of a configuration: a fit that is
    killed goes on by later ones."""

    anchors: float | None = None
    calibration: float | None = None


@dataclass(frozen=True)
class FitConfig:
    """The fit's parameters: anchor `tokens` of the target; the number of source `layers` to read
    (None: half) and their `choice` ("spread" evenly, the "best", or those with "full" attention);
    the latent's `rank`; the `ridge` as a share of unit variance (None: chosen on held-out
    documents); the `predecessors` of a token whose embeddings are features too (None: no
    embeddings at all, for packages without text); calibration on `calibration` texts in steps of
    `batch`, for `epochs` with a relative `rate`, ended by `patience` epochs without a better score
    on the `held_out` share of documents, or for as many `minutes`. `lessons` are "short" texts, or
    "long" ones with facts hidden in them, of which minutes have as many as they hold.
    Models and sums are on the `device` ("cpu", "cuda", or "auto": CUDA where there is one), beside
    `workers` processes that tokenise."""

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
    minutes: float | None = None
    lessons: Literal["short", "long"] = "short"
    seed: int = 0
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    workers: int = 0

    def resolved(self) -> FitConfig:
        """The configuration with its device chosen. Raises BadInput for one that is not there."""
        import torch

        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            raise BadInput(
                "no CUDA device",
                found="none that torch sees",
                expected="a GPU, and torch with CUDA",
                remedy="fit with --device cpu",
            )
        auto: Literal["cpu", "cuda"] = "cuda" if found else "cpu"
        return replace(self, device=auto if self.device == "auto" else self.device)
