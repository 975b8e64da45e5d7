"""A W-Matrix's products in int8: half of a file's bytes, the same map once it is loaded.

`encode` [F, R] has one scale for each feature, `decode` [R, O] one for each output: what a row and
a column measure in their own units. Along the latent, magnitudes differ more, and one scale for
each of its dims loses up to four times as much (docs/fidelity-log.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awareness_vllm.tensor_file import FileRefused

LATENT_DIM = {"encode": 1, "decode": 0}
"""The latent's dim of each product, along which its numbers share a scale."""
LEVELS = 127
NOTHING = 2.0**-100
"""Largest weight of a row, below which it counts as zero: no scale is a subnormal number."""


def quantized(products: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`encode` and `decode` as int8, with their scales, float32 [F] and [O].

    What `dequantized` gives is quantized to the same bytes again: bfloat16 rounds a number by less
    than half a level, and the largest of each scale not at all.
    """
    stored: dict[str, Tensor] = {}
    for name, dim in LATENT_DIM.items():
        weights = products[name].bfloat16().float()
        largest = weights.abs().amax(dim, keepdim=True)
        scale = torch.where(largest > NOTHING, largest / LEVELS, 0)
        levels = torch.where(scale > 0, weights / scale, 0).round()
        stored |= {name: levels.to(torch.int8), f"{name}_scale": scale.flatten()}
    return stored


def dequantized(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`encode` and `decode` in bfloat16.

    Raises:
        FileRefused: numbers or scales that `quantized` does not give.
    """
    products = {
        name: (stored[name].float() * stored[f"{name}_scale"].unsqueeze(dim)).bfloat16()
        for name, dim in LATENT_DIM.items()
    }
    for name, tensor in quantized(products).items():
        if not torch.equal(tensor, stored[name]):
            raise FileRefused(f"{name} that no rounding to int8 gives")
    return products
