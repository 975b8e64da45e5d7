"""Latent packages: a memory as one map encodes it, for that map's target.

Instead of `layers.i.key` and `layers.i.value` the file has `latent` [T, R], one row for each of the
target's tokens of the text; `tokens`, `spans` and `text` are the target's, too. In int8, each dim
of the latent has a scale, `latent_scale` [R]: the dims' magnitudes differ fifty times, those of the
tokens hardly at all, and one scale for each token loses five times as much (docs/fidelity-log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import Spans
from awareness_vllm.packages.manifest import Manifest, StoredLatent

LEVELS = 127


@dataclass(frozen=True)
class LatentPackage:
    """A latent package in memory. `tokens` and `spans` [T, 2] are the target's, without its sink;
    `stored` are the latent's tensors as the file has them."""

    manifest: Manifest
    text: str
    tokens: list[int]
    spans: Spans
    stored: dict[str, Tensor]

    @property
    def geometry(self) -> Geometry:
        """The source's."""
        return self.manifest.geometry

    @property
    def info(self) -> StoredLatent:
        assert self.manifest.latent is not None
        return self.manifest.latent

    def rows(self, part: slice = slice(None)) -> Tensor:
        """A part of the latent [T, R], of the map's dtype, or in float32 where it was stored in
        int8."""
        rows = self.stored["latent"][part]
        scale = self.stored.get("latent_scale")
        return rows if scale is None else rows.float() * scale


def rounded(rows: Tensor) -> dict[str, Tensor]:
    """A latent [T, R] in int8, with the scale of each dim, float32 [R]."""
    rows = rows.float()
    scale = rows.abs().amax(0) / LEVELS
    levels = torch.where(scale > 0, rows / scale, 0).round().clamp(-LEVELS, LEVELS)
    return {"latent": levels.to(torch.int8), "latent_scale": scale}
