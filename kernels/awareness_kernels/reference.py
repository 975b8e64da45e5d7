"""The mathematics of alignment in plain torch: in float32, in float64 for float64 arguments.

Letters: T tokens, S sink tokens, H heads, D head dim, L layers, E embedding width, R rank, C pairs
of dims that are turned, F features, O outputs, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the mean square that embeddings are normalised by."""
LARGEST = 2.0**15
"""Magnitude of a stored state, which float16 can hold and every dtype exactly. Genuine states stay
below a hundredth of it."""


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first `2 * C` dims of x by a position's angles.

    Args:
        x: [T, H, D], any float dtype.
        cos, sin: [T, C], `2 * C <= D`.
        interleaved: a pair's dims stand side by side (GPT-J), else half of 2 * C apart (GPT-NeoX).

    Returns:
        [T, H, D] float32.
    """
    rotated = cos.shape[-1]
    x = wide(x)
    cos, sin = cos[:, None, :], sin[:, None, :]
    head, rest = x[..., : 2 * rotated], x[..., 2 * rotated :]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    both = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((both, rest), dim=-1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The inverse of `rotate`. Divides by cos²+sin², so scaled tables (YaRN) invert too."""
    scale = cos * cos + sin * sin
    return rotate(x, cos / scale, -sin / scale, interleaved)


def rms_normalise(x: Tensor, eps: float = EPSILON) -> Tensor:
    """x / rms(x) over the last dim, in float32."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def with_predecessors(x: Tensor, count: int) -> Tensor:
    """Each row beside its `count` predecessors; before the first row stand zeros. Of -1, nothing.

    Args:
        x: [T, E].

    Returns:
        [T, (1 + count) * E]: the row itself first, then one before, two before, …
    """
    if count < 0:
        return x[:, :0]
    padded = torch.nn.functional.pad(x, (0, 0, count, 0))
    return torch.cat([padded[count - i : count - i + len(x)] for i in range(count + 1)], dim=-1)


def encode(features: Tensor, weight: Tensor) -> Tensor:
    """features [T, F] and weight [F, R] to the latent [T, R], in the weight's dtype."""
    return features.to(weight.dtype) @ weight


def decode(latent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """latent [T, R], weight [R, O], bias [O] to position-free targets [T, O] float32."""
    return latent.to(weight.dtype) @ weight + bias  # the sum is as wide as the bias


def encode_states(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
    source: Tensor,
    masked: Tensor,
    ids: Tensor,
    embedding: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    predecessors: int,
    sink: int,
) -> Tensor:
    """A memory's latent: positions off, source states and embeddings side by side, standardised.

    Args:
        keys, values: per source layer that is read [N, H, D], keys as cached at 0 … N-1.
        cos, sin: per layer [P, C], contiguous; C is 0 where keys have no rotary positions.
        interleaved: per layer, whether the turned pairs are interleaved.
        source: [T] int64, the source token that each row reads.
        masked: [T] bool, rows whose source states say nothing.
        ids: [sink + T] int64, the target's; their embeddings are rows of `embedding` [V, E].
        mean, scale: [F], of the features.
        weight: [F, R]; F is the width of all states and (1 + predecessors) * E.
        predecessors: how many tokens before a row's lend it their embeddings; -1 for none at all.

    Returns:
        [T, R] in the weight's dtype.
    """
    cos_sin = zip(keys, cos, sin, interleaved, strict=True)
    free = [unrotate(k[source], c[source], s[source], bool(w)).flatten(1) for k, c, s, w in cos_sin]
    states = torch.cat([*free, *(wide(value[source]).flatten(1) for value in values)], dim=1)
    width = states.shape[1]
    states = (states - mean[:width]) * scale[:width]
    states[masked] = 0
    rows = with_predecessors(rms_normalise(embedding[ids]), predecessors)[sink:]
    tokens = (rows - mean[width:]) * scale[width:]
    return encode(torch.cat((states, tokens), dim=1), weight)


def decode_paged(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
    sink_keys: Sequence[Tensor],
    sink_values: Sequence[Tensor],
    key_pages: Sequence[Tensor],
    value_pages: Sequence[Tensor],
    slot_mapping: Sequence[Tensor],
    scales: Tensor,
) -> None:
    """A memory's sink and the keys and values of its latent, written where the engine looks.

    Args:
        latent: [T, R]; weight [R, O] and bias [O]: keys of all layers, then values, head by head.
        positions: [S + T] int64; cos, sin, interleaved: the target's, as in `encode_states`.
        sink_keys, sink_values: per layer [S, H, D], as cached.
        key_pages, value_pages: per layer [pages, page size, H, D], by any strides; written, with
            finite numbers alone (`write`).
        slot_mapping: per layer [S + T] int64, where each row belongs; negative: not written.
        scales: [2 L] float32, what stored keys of each layer, then values, are to be multiplied by;
            or one for each head, in the same order.
    """
    sink = len(positions) - len(latent)
    flat = decode(latent, weight, bias)
    widths = [page.shape[2] * page.shape[3] for page in (*key_pages, *value_pages)]
    states = flat.split(widths, dim=1)
    count = len(key_pages)
    units = by_layer(scales, (*key_pages, *value_pages))
    for i, page in enumerate((*key_pages, *value_pages)):
        x = states[i].unflatten(1, page.shape[2:])
        if i < count:
            at = positions[sink:]
            x = rotate(x, cos[i][at], sin[i][at], bool(interleaved[i]))
        own = (*sink_keys, *sink_values)[i]
        write(page, torch.cat((wide(own), x)) / units[i], slot_mapping[i % count])


def rotate_paged(
    key_pages: Sequence[Tensor],
    slot_mapping: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
    scales: Tensor,
) -> None:
    """Keys that lie in pages, moved by an offset of positions where they are.

    Args:
        key_pages: per layer [pages, page size, H, D], by any strides; rewritten.
        slot_mapping: per layer [T] int64, which keys; negative ones are left alone.
        cos, sin: per layer [C], of the offset's angles.
        scales: [L] float32, what stored keys are to be multiplied by; or one for each head.
    """
    units = by_layer(scales, key_pages)
    for i, (page, slot) in enumerate(zip(key_pages, slot_mapping, strict=True)):
        real = slot[slot >= 0]
        stored = raw(page)[real // page.shape[1], real % page.shape[1]].view(page.dtype)
        keys = wide(stored) * units[i]
        rows = [table.expand(len(real), -1) for table in (cos[i], sin[i])]
        write(page, rotate(keys, rows[0], rows[1], bool(interleaved[i])) / units[i], real)


def by_layer(scales: Tensor, pages: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's scales [1, 1] or [H, 1], of which there is one for each layer or each head."""
    sizes = [page.shape[2] for page in pages]
    parts = scales.split([1] * len(pages) if len(scales) == len(pages) else sizes)
    return [part[:, None] for part in parts]


def write(page: Tensor, x: Tensor, slot_mapping: Tensor) -> None:
    """Scatter x [T, H, D] into pages [pages, page size, H, D] by slot_mapping [T]; < 0: skip.

    Numbers beyond `largest` become that, and what is no number becomes 0: attention multiplies
    what it masks by 0, and through a block that is used again they would reach other requests.
    """
    real = slot_mapping >= 0
    slot_mapping = slot_mapping[real]
    most = largest(page.dtype)
    finite = x[real].nan_to_num(0.0, most, -most).clamp(-most, most)
    raw(page)[slot_mapping // page.shape[1], slot_mapping % page.shape[1]] = raw(
        finite.to(page.dtype)
    )


def largest(dtype: torch.dtype) -> float:
    """The magnitude that no stored state of a dtype exceeds."""
    return min(LARGEST, torch.finfo(dtype).max)


def raw(x: Tensor) -> Tensor:
    """float8 as bytes: torch moves it, but does not index it."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
