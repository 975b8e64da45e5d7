"""The features of a target token: position-free source states, target embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from awareness_vllm.kernels import rms_normalise, with_predecessors
from awareness_vllm.models.geometry import Geometry, Positions
from awareness_vllm.models.rope import Rotations

Embed = Callable[[Tensor], Tensor]
"""A model's embedding: ids [T] int64 to rows [T, E]; they are normalised, whatever their norm."""
PositionEmbeddings = Mapping[str, Tensor]
"""Position embeddings [P, E] by side, "source" or "target", of models with learned positions."""


def flat_states(
    geometry: Geometry,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    tokens: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Position-free keys of the layers, then their values, in one row for each token.

    Args:
        keys, values: per layer [T, H, D] as cached at positions 0 … T-1.
        tokens: [N] int64, indices of the tokens; all by default.
        layers: indices of the layers; all by default.

    Returns:
        [N, geometry.width_of(layers)] float32.
    """
    if tokens is None:
        tokens = torch.arange(len(keys[0]))
    if layers is None:
        layers = range(len(geometry.layers))
    rotations = Rotations(tokens, keys[0].device)
    tokens = tokens.to(keys[0].device)
    own_keys, own_values = ([part[i][tokens] for i in layers] for part in (keys, values))
    schemes = [geometry.layers[i].positions for i in layers]
    return flat_rows(schemes, own_keys, own_values, rotations)


def flat_rows(
    positions: Sequence[Positions],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rotations: Rotations,
) -> Tensor:
    """Position-free keys, then values [N, width] float32, of layers' cached states [N, H, D] with
    these schemes of `positions`, by the rotations of the rows' own positions."""
    layers = zip(positions, keys, strict=True)
    free = [rotations.unrotate(key, scheme).flatten(1) for scheme, key in layers]
    return torch.cat([*free, *(value.float().flatten(1) for value in values)], dim=1)


def split_states(geometry: Geometry, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values per layer, [..., T, H, D], of rows [..., T, width] of `joined`, or of
    `flat_states`, which are position-free."""
    widths = [layer.width for layer in geometry.layers]
    shaped = [
        part.unflatten(-1, (layer.heads, layer.head_dim))
        for part, layer in zip(flat.split(widths * 2, dim=-1), geometry.layers * 2, strict=True)
    ]
    return shaped[: len(widths)], shaped[len(widths) :]


def joined(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """All layers' keys, then values, [T, H, D] each, in one row for each token, [T, W], as they
    are: `flat_states` takes the positions off."""
    return torch.cat([state.flatten(1) for state in (*keys, *values)], dim=1)


def state_columns(geometry: Geometry, layers: Iterable[int]) -> Tensor:
    """The indices of some layers' keys, then values, among the columns of `flat_states`."""
    parts = split_states(geometry, torch.arange(geometry.width)[None])
    return torch.cat([part[layer].flatten() for part in parts for layer in layers])


def masked_rows(index: Tensor) -> Tensor:
    """Whether each target token is aligned to the source's first position, [T] bool.

    That position is the source's attention sink: its states carry nothing of the text.
    """
    return index == 0


def embedding_features(
    embed: Embed, ids: Sequence[int], sink: int, predecessors: int | None
) -> Tensor:
    """Normalised embeddings of each token and its predecessors, without rows for the first `sink`
    ids; no columns for a map that reads no tokens (`predecessors` None).

    Returns:
        [len(ids) - sink, (1 + predecessors) * E] float32.
    """
    if predecessors is None:
        return torch.empty(len(ids) - sink, 0)
    rows = rms_normalise(embed(torch.tensor(ids, dtype=torch.int64)))
    return with_predecessors(rows, predecessors)[sink:]


def with_position_embeddings(
    features: Tensor, position_embeddings: PositionEmbeddings, source: Tensor, target: Tensor
) -> Tensor:
    """Features [T, F] with the position embeddings of each token in further columns.

    Learned positions are added to the embeddings, so states depend on them by a term that the map
    has to remove for the source and to add for the target. Without learned positions, the features
    unchanged.

    Args:
        source, target: [T] int64, the token's position in either model.
    """
    if not position_embeddings:
        return features
    where = {"source": source, "target": target}
    return torch.cat(
        [
            features,
            *(position_embeddings[side][where[side]] for side in sorted(position_embeddings)),
        ],
        dim=1,
    )
