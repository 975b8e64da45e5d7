"""The published sources of degradation as constraints on a map, each of which can be lifted.

A map with all five is what a naive conversion would be. Three bind the regression itself: which
source layers a target head reads, which of their heads, and how many dims the fitted values have.
Two bind what is made of it: where keys are placed, and what norms they have. In all maps the
target's own token embeddings (and learned positions) are read freely: they are no part of a memory.
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
"""What a target head reads: source heads, several of them merged into one by their shares."""


@dataclass(frozen=True)
class Block:
    """Target states, `columns` [B] of them, that read the same features: `merge` [F, M] sparse,
    from standardised ones; its columns are orthonormal, so that a ridge on what is merged is a
    ridge on what it was merged from."""

    merge: Tensor
    columns: Tensor


def blocks(
    source: Geometry, read: Sequence[int], target: Geometry, scale: Tensor, lifted: Lifted
) -> list[Block]:
    """The target's states by what they may read.

    Args:
        read: the source's layers among the features, which come first.
        scale: [F], that the features are standardised by.
    """
    columns: dict[Reading, list[Tensor]] = {}
    for head, part in heads(target, range(len(target.layers))):
        columns.setdefault(reading(source, read, target, head, lifted), []).append(
            torch.arange(part.start, part.stop)
        )
    return [
        Block(merge(source, read, scale, found), torch.cat(parts))
        for found, parts in columns.items()
    ]


def reading(
    source: Geometry, read: Sequence[int], target: Geometry, head: Head, lifted: Lifted
) -> Reading:
    """What one target head may read of the source."""
    layers = tuple(read) if LAYERS in lifted else (at_depth(source, read, target, head.layer),)
    if HEADS in lifted:
        return tuple(((one, 1.0),) for one, _ in heads(source, layers))
    return tuple(at_place(source, layer, target, head) for layer in layers)


def at_depth(source: Geometry, read: Sequence[int], target: Geometry, layer: int) -> int:
    """The source layer, of those that are read, nearest to a target layer's relative depth."""
    depth = layer / max(1, len(target.layers) - 1)
    return min(read, key=lambda i: abs(i / max(1, len(source.layers) - 1) - depth))


def at_place(
    source: Geometry, layer: int, target: Geometry, head: Head
) -> tuple[tuple[Head, float], ...]:
    """The heads of a source layer that stand at a target head's place, keys for keys and values for
    values, each with its share."""
    ends = source.layers[layer], target.layers[head.layer]
    shares = HEAD_MAPPINGS["uniform"](*ends, True)[head.head].tolist()
    return tuple((Head(head.part, layer, i), share) for i, share in enumerate(shares) if share)


def merge(source: Geometry, read: Sequence[int], scale: Tensor, wanted: Reading) -> Tensor:
    """From standardised features to those that are read, [F, M] sparse: source heads merged in
    their own units, then all features that are not the source's states as they are."""
    where = dict(heads(source, tuple(read)))
    rows, columns, weights, width = [], [], [], 0
    for merged in wanted:
        dim = source.layers[merged[0][0].layer].head_dim
        for head, share in merged:
            rows.append(torch.arange(where[head].start, where[head].stop))
            columns.append(torch.arange(width, width + dim))
            weights.append(share * scale[rows[-1]])
        width += dim
    free = torch.arange(source.width_of(read), len(scale))
    index = torch.stack(
        (torch.cat((*rows, free)), torch.cat((*columns, torch.arange(len(free)) + width)))
    )
    weight = torch.cat((*weights, torch.ones(len(free))))
    length = torch.zeros(width + len(free)).index_add_(0, index[1], weight.square()).sqrt()
    shape = len(scale), len(length)
    found = torch.sparse_coo_tensor(index, weight / length[index[1]], shape, check_invariants=True)
    return found.coalesce()
