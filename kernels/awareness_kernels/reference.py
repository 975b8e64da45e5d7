"""The mathematics of alignment in plain torch.

Letters: T tokens, H heads, D head dim, L layers, E embedding width, R rank, C cos/sin width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first `2 * C` dims of x by a position's angles, halves paired (GPT-NeoX style).

    Args:
        x: [T, H, D], any float dtype.
        cos, sin: [T, C] float32, `2 * C <= D`.

    Returns:
        [T, H, D] float32.
    """
    half = cos.shape[-1]
    x = x.float()
    cos, sin = cos[:, None, :], sin[:, None, :]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`. Divides by cos²+sin², so scaled tables (YaRN) invert too."""
    scale = cos * cos + sin * sin
    return rotate(x, cos / scale, -sin / scale)


def rms_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over the last dim, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def with_predecessors(x: Tensor, count: int) -> Tensor:
    """Each row beside its `count` predecessors; before the first row stand zeros.

    Args:
        x: [T, E].

    Returns:
        [T, (1 + count) * E]: the row itself first, then one before, two before, …
    """
    padded = torch.nn.functional.pad(x, (0, 0, count, 0))
    return torch.cat([padded[count - i : count - i + len(x)] for i in range(count + 1)], dim=-1)


def encode(features: Tensor, weight: Tensor) -> Tensor:
    """features [T, F] and weight [F, R] to the latent [T, R], in the weight's dtype."""
    return features.to(weight.dtype) @ weight


def decode(latent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """latent [T, R], weight [R, O], bias [O] to position-free targets [T, O] float32."""
    return (latent.to(weight.dtype) @ weight).float() + bias
