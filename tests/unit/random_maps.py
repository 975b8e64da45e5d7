"""Random maps: shapes matter here, not worth."""

from __future__ import annotations

import torch
from torch import Tensor

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest


def random_map(source: Geometry, target: Geometry, rank: int) -> WMatrix:
    """A map of all of the source's layers, each time the same."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    predecessors, sink = 2, (2, 7)
    features = source.width + (1 + predecessors) * target.hidden_size
    return WMatrix(
        WMatrixManifest(
            source=source,
            target=target,
            layers=tuple(range(len(source.layers))),
            rank=rank,
            predecessors=predecessors,
            sink=sink,
            anchors=Anchors(digest="a" * 64, documents=1, tokens=100),
            fit={"seed": 0},
            r2={"keys": 0.5, "values": 0.25},
            reconstruction_error=0.1,
            versions={"torch": "0"},
        ),
        mean=random(features),
        scale=random(features).abs() + 0.5,
        encode=random(features, rank),
        decode=random(rank, target.width),
        bias=random(target.width),
        sink_keys=[random(len(sink), g.heads, g.head_dim) for g in target.layers],
        sink_values=[random(len(sink), g.heads, g.head_dim) for g in target.layers],
    )
