"""The published sources of degradation as constraints on a map, each of which can be lifted.

A map with all five is a naive conversion. Three constrain the regression: the source layers that a
target head reads, their heads, and the rank of the fitted values. Two constrain its outputs: the
positions of keys, and their norms. All maps read the target's own token embeddings (and learned
positions), which are no part of a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.shares import HEADS, LAYERS, Lifted
from awareness_vllm.aligners.training_free import HEAD_MAPPINGS
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.heads import Head, heads

Reading = tuple[tuple[tuple[Head, float], ...], ...]
"""The source heads that a target head reads, groups of them merged by shares."""


@dataclass(frozen=True)
class Block:
    """Target states, `columns` [B], that read the same features: `merge` [F, M] sparse, of the
    standardised ones. Its columns are orthonormal, so that a ridge on merged features is a ridge
    on their parts."""

    merge: Tensor
    columns: Tensor


def blocks(
    source: Geometry, read: Sequence[int], target: Geometry, std: Tensor, lifted: Lifted
) -> list[Block]:
    """The target's states in blocks that read the same features.

    Args:
        read: the source's layers among the features, which come first.
        std: [F], the features' standard deviations.
    """
    columns: dict[Reading, list[Tensor]] = {}
    for head, part in heads(target, range(len(target.layers))):
        columns.setdefault(reading(source, read, target, head, lifted), []).append(
            torch.arange(part.start, part.stop)
        )
    return [
        Block(merge(source, read, std, groups), torch.cat(parts))
        for groups, parts in columns.items()
    ]


def reading(
    source: Geometry, read: Sequence[int], target: Geometry, head: Head, lifted: Lifted
) -> Reading:
    """The source heads that one target head reads."""
    layers = tuple(read) if LAYERS in lifted else (at_depth(source, read, target, head.layer),)
    if HEADS in lifted:
        return tuple(((one, 1.0),) for one, _ in heads(source, layers))
    return tuple(at_place(source, layer, target, head) for layer in layers)


def at_depth(source: Geometry, read: Sequence[int], target: Geometry, layer: int) -> int:
    """The source layer among `read` nearest to a target layer's relative depth."""
    depth = layer / max(1, len(target.layers) - 1)
    return min(read, key=lambda i: abs(i / max(1, len(source.layers) - 1) - depth))


def at_place(
    source: Geometry, layer: int, target: Geometry, head: Head
) -> tuple[tuple[Head, float], ...]:
    """The heads of a source layer at a target head's relative place, keys for keys and values for
    values, with their shares."""
    ends = source.layers[layer], target.layers[head.layer]
    shares = HEAD_MAPPINGS["uniform"](*ends, True)[head.head].tolist()
    return tuple((Head(head.part, layer, i), share) for i, share in enumerate(shares) if share)


def merge(source: Geometry, read: Sequence[int], std: Tensor, groups: Reading) -> Tensor:
    """The matrix [F, M], sparse, from standardised features to those of a block: source heads
    merged in their own units, then all features that are not the source's states."""
    slices = dict(heads(source, tuple(read)))
    rows, columns, weights, width = [], [], [], 0
    for group in groups:
        dim = source.layers[group[0][0].layer].head_dim
        for head, share in group:
            rows.append(torch.arange(slices[head].start, slices[head].stop))
            columns.append(torch.arange(width, width + dim))
            weights.append(share * std[rows[-1]])
        width += dim
    free = torch.arange(source.width_of(read), len(std))
    index = torch.stack(
        (torch.cat((*rows, free)), torch.cat((*columns, torch.arange(len(free)) + width)))
    )
    weight = torch.cat((*weights, torch.ones(len(free))))
    length = torch.zeros(width + len(free)).index_add_(0, index[1], weight.square()).sqrt()
    shape = len(std), len(length)
    matrix = torch.sparse_coo_tensor(index, weight / length[index[1]], shape, check_invariants=True)
    return matrix.coalesce()
