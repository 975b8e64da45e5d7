"""Put positions on keys and take them off: a registry, one small function per scheme.

A scheme is a function `(positions [T] int64, descriptor) -> (cos, sin)`, float32 [T, C] each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.geometry import Positions
from awareness_vllm.kernels import rotate, unrotate

Scheme = Callable[[Tensor, Positions], tuple[Tensor, Tensor]]
SCHEMES: dict[str, Scheme] = {}
MIN_BITS = 11
"""Tables are kept for powers of two, of at least so many bits: few of them ever exist."""


def scheme(name: str) -> Callable[[Scheme], Scheme]:
    """Register a positional scheme under the name that geometries use."""

    def register(function: Scheme) -> Scheme:
        SCHEMES[name] = function
        return function

    return register


@scheme("rope")
def rope(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """Rotary embedding with base `theta` over `rotary_dim` dims (Su et al., arXiv 2104.09864)."""
    assert descriptor.theta is not None
    assert descriptor.rotary_dim is not None
    exponents = torch.arange(0, descriptor.rotary_dim, 2).float() / descriptor.rotary_dim
    angles = positions.float()[:, None] * (1.0 / descriptor.theta**exponents)
    return angles.cos(), angles.sin()


def table(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """cos and sin of these positions [T] int64, [T, C] float32 each."""
    if descriptor.scheme not in SCHEMES:
        raise UnsupportedModel(
            "unknown positional scheme", found=descriptor.scheme, expected=sorted(SCHEMES)
        )
    last = int(positions.max()) if len(positions) else 0
    cos, sin = _rows(descriptor, 1 << max(last.bit_length(), MIN_BITS))
    return cos[positions], sin[positions]


@functools.lru_cache
@torch.inference_mode(False)  # else tables made while serving could not take part in a calibration
def _rows(descriptor: Positions, count: int) -> tuple[Tensor, Tensor]:
    """The tables of positions 0 … count-1: every layer of a model asks for the same ones."""
    return SCHEMES[descriptor.scheme](torch.arange(count), descriptor)


def strip(keys: Tensor, positions: Tensor, descriptor: Positions) -> Tensor:
    """Keys [T, H, D] as cached to position-free keys, float32."""
    return unrotate(keys, *table(positions, descriptor))


def apply(keys: Tensor, positions: Tensor, descriptor: Positions) -> Tensor:
    """Position-free keys [T, H, D] to keys as cached at these positions, float32."""
    return rotate(keys, *table(positions, descriptor))


def shift(keys: Tensor, offset: int, descriptor: Positions) -> Tensor:
    """Keys [T, H, D] as cached, moved by `offset` positions; by none, bit for bit as they were."""
    if not offset:
        return keys
    cos, sin = table(torch.tensor([offset]), descriptor)
    return rotate(keys, cos.expand(len(keys), -1), sin.expand(len(keys), -1))
