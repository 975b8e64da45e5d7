"""The head mapping of a W-Matrix: shares of source heads in target heads, from its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.file import WMatrix


@dataclass(frozen=True)
class Head:
    """One KV head's keys or values: `part` is "key" or "value"."""

    part: str
    layer: int
    head: int

    def __str__(self) -> str:
        return f"layer {self.layer} head {self.head} {self.part}"


@dataclass(frozen=True)
class HeadSources:
    """The source heads of one `target` head. All `shares` of the map's weight, largest first, add
    up to 1 with `tokens`, the share of the target's own embeddings."""

    target: Head
    shares: tuple[tuple[Head, float], ...]
    tokens: float


@dataclass(frozen=True)
class HeadShares:
    """The share of each source head in each target head.

    `shares` [target heads, source heads] has a row for each of `down` and a column for each of
    `across`; what a row lacks to 1 is the share of the target's own embeddings.
    """

    source: str
    target: str
    across: tuple[Head, ...]
    down: tuple[Head, ...]
    shares: np.ndarray


def head_mapping_summary(wmatrix: WMatrix, top: int = 3) -> list[HeadSources]:
    """The `top` source heads of each target head by weight in the map.

    The weight of a source head is the squared Frobenius norm of its block of encode·decode;
    features are standardised, so blocks compare.
    """
    manifest = wmatrix.manifest
    encode, decode = wmatrix.encode.float(), wmatrix.decode.float()
    sources = list(heads(manifest.source, manifest.layers))
    targets = heads(manifest.target, range(len(manifest.target.layers)))
    summary = []
    for target, columns in targets:
        block = decode[:, columns]
        rows = ((encode @ (block @ block.T)) * encode).sum(1)
        weights = torch.stack([rows[part].sum() for _, part in sources])
        order = weights.argsort(descending=True)[:top].tolist()
        total = rows.sum().item() or 1.0
        shares = tuple((sources[i][0], weights[i].item() / total) for i in order)
        tokens = rows[manifest.source_width :].sum().item() / total
        summary.append(HeadSources(target, shares, tokens))
    return summary


def head_shares(wmatrix: WMatrix) -> HeadShares:
    """The shares of all source heads in all target heads, as one table."""
    manifest = wmatrix.manifest
    across = tuple(head for head, _ in heads(manifest.source, manifest.layers))
    rows = head_mapping_summary(wmatrix, top=len(across))
    by_head = [dict(row.shares) for row in rows]
    shares = np.array([[row[head] for head in across] for row in by_head])
    down = tuple(row.target for row in rows)
    return HeadShares(manifest.source.name, manifest.target.name, across, down, shares)


def table(rows: Sequence[HeadSources]) -> str:
    """A head mapping as text, a line for each target head."""
    lines = []
    for row in rows:
        shares = ", ".join(f"{head} {share:.0%}" for head, share in row.shares)
        tokens = f"  (tokens {row.tokens:.0%})" if row.tokens else ""
        lines.append(f"{row.target!s:24} ← {shares}{tokens}")
    return "\n".join(lines)


def layer_correspondence(wmatrix: WMatrix) -> Tensor:
    """The share of each source layer that is read in each target layer.

    Returns:
        [target layers, source layers read], rows add up to 1.
    """
    manifest = wmatrix.manifest
    shares = torch.zeros(len(manifest.target.layers), len(manifest.layers))
    column = {layer: i for i, layer in enumerate(manifest.layers)}
    for row in head_mapping_summary(wmatrix, top=2**31):
        for source, share in row.shares:
            shares[row.target.layer, column[source.layer]] += share
    return shares / shares.sum(1, keepdim=True)


def main_layers(wmatrix: WMatrix) -> list[int]:
    """The source layer with the largest share, for each target layer."""
    read = wmatrix.manifest.layers
    return [read[i] for i in layer_correspondence(wmatrix).argmax(1).tolist()]


def heads(geometry: Geometry, layers: tuple[int, ...] | range) -> Iterator[tuple[Head, slice]]:
    """Each head of these layers and its slice of the features: keys first, then values."""
    begin = 0
    for part in ("key", "value"):
        for layer in layers:
            for head in range(geometry.layers[layer].heads):
                end = begin + geometry.layers[layer].head_dim
                yield Head(part, layer, head), slice(begin, end)
                begin = end
