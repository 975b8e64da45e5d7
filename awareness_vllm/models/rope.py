"""Positional encodings of keys: a registry with one small function per scheme.

A scheme is a function `(positions [T] float32, descriptor) -> (cos, sin)`, float32 [T, C] each, for
the C pairs of dims that it rotates; C is 0 where keys are not rotated. The formulas are vLLM's,
operation by operation, so the tables equal vLLM's bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from awareness_vllm import kernels
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Positions

Scheme = Callable[[Tensor, Positions], tuple[Tensor, Tensor]]
SCHEMES: dict[str, Scheme] = {}
MIN_BITS = 11
"""Tables have a power of two of rows, at least 2 ** MIN_BITS, so that few are ever built."""


def scheme(name: str) -> Callable[[Scheme], Scheme]:
    """Register a positional scheme under its name in geometries."""

    def register(function: Scheme) -> Scheme:
        SCHEMES[name] = function
        return function

    return register


@scheme("rope")
def rope(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """Rotary embedding with base `theta` over `rotary_dim` dims (Su et al., arXiv 2104.09864)."""
    return cos_sin(positions, 1.0 / wavelengths(descriptor))


@scheme("linear")
def linear(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """Position interpolation (arXiv 2306.15595). transformers divides the frequencies instead of
    the positions: its angles differ in the last bits."""
    (factor,) = numbers(descriptor, "factor")
    return cos_sin(positions / factor, 1.0 / wavelengths(descriptor))


@scheme("dynamic")
def dynamic(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """Dynamic NTK scaling: the base grows with the sequence, so that `length` positions fit.

    A state is described by the length that its table was made for. vLLM makes one table, for the
    model's `max_position_embeddings`; so does transformers, and another for each longer sequence.
    """
    theta, dim, factor, original, length = numbers(
        descriptor, "theta", "rotary_dim", "factor", "original", "length"
    )
    stretch = (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    stretched = descriptor.model_copy(update={"theta": theta * stretch})
    return cos_sin(positions, 1.0 / wavelengths(stretched))


@scheme("llama3")
def llama3(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """Llama 3.1's scaling: slow pairs are stretched, fast ones not, in between a ramp over the
    rotations of a pair in `original` positions."""
    factor, original, low, high = numbers(
        descriptor, "factor", "original", "beta_slow", "beta_fast"
    )
    plain = 1.0 / wavelengths(descriptor)
    waves = 2 * math.pi / plain
    ramp = (original / waves - low) / (high - low)
    between = (1 - ramp) * plain / factor + ramp * plain
    slow = torch.where(waves > original / low, plain / factor, between)
    return cos_sin(positions, torch.where(waves < original / high, plain, slow))


@scheme("yarn")
def yarn(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """YaRN (arXiv 2309.00071): a ramp over the pair's index; `scale` sharpens attention."""
    waves = wavelengths(descriptor)
    plain = 1 - yarn_ramp(descriptor, len(waves))
    (factor,) = numbers(descriptor, "factor")
    inverse = 1.0 / (factor * waves) * (1 - plain) + 1.0 / waves * plain
    return cos_sin(positions, inverse, descriptor.scale)


def yarn_ramp(descriptor: Positions, pairs: int) -> Tensor:
    """The share of stretching of each pair, [C] from 0 to 1."""
    theta, dim, original = numbers(descriptor, "theta", "rotary_dim", "original")
    low, high = (
        dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        for rotations in numbers(descriptor, "beta_fast", "beta_slow")
    )
    if descriptor.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    return ((torch.arange(pairs).float() - low) / (high - low)).clamp(0, 1)


@scheme("longrope")
def longrope(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """LongRoPE (arXiv 2402.13753): a factor for each pair."""
    waves, factors = wavelengths(descriptor), descriptor.factors or ()
    if len(factors) != len(waves):
        raise UnsupportedModel(
            "LongRoPE needs one factor for each rotated pair",
            found=f"{len(factors)} factors",
            expected=f"{len(waves)}",
        )
    return cos_sin(positions, 1.0 / (torch.tensor(factors) * waves), descriptor.scale)


@scheme("none")
@scheme("alibi")
@scheme("learned")
def no_rotation(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """No rotation: no positions at all, a bias on the attention scores by distance (ALiBi, arXiv
    2108.12409), or positions added to the embeddings."""
    return cos_sin(positions, torch.empty(0))


def wavelengths(descriptor: Positions) -> Tensor:
    """theta^(2i / rotary_dim) of each rotated pair i, [C]: positions per radian."""
    theta, dim = numbers(descriptor, "theta", "rotary_dim")
    return theta ** (torch.arange(0, int(dim), 2).float() / dim)


def numbers(descriptor: Positions, *fields: str) -> list[float]:
    """The values of fields that a descriptor's scheme needs.

    Raises:
        UnsupportedModel: one of them is missing.
    """
    if missing := [field for field in fields if not getattr(descriptor, field)]:
        raise UnsupportedModel(
            f"the positions of scheme {descriptor.scheme!r} are incomplete",
            found=f"no {', '.join(missing)}",
            expected=", ".join(fields),
        )
    return [getattr(descriptor, field) for field in fields]


def cos_sin(
    positions: Tensor, inverse: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, C] of positions [T] times the `inverse` wavelengths [C], times `scale`."""
    angles = positions[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale is None else (cos * scale, sin * scale)


def cos_sin_table(positions: Tensor, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """cos and sin [T, C] float32 of positions [T] int64, on their device.

    Raises:
        UnsupportedModel: an unknown scheme, or a descriptor without a field that its scheme needs.
    """
    last = int(positions.max()) if len(positions) else 0
    cos, sin = _rows(descriptor, 1 << max(last.bit_length(), MIN_BITS))
    where = positions.device
    return cos.to(where)[positions], sin.to(where)[positions]


class Rotations:
    """The rotations of some positions [T] int64, each descriptor's table made once, for layers that
    share it."""

    def __init__(self, positions: Tensor, device: torch.device | str | None = None) -> None:
        self.positions, self.device = positions, device
        self.tables: dict[Positions, tuple[Tensor, Tensor]] = {}

    def table(self, descriptor: Positions) -> tuple[Tensor, Tensor]:
        """cos and sin [T, C] of a descriptor, on the device. Raises as `cos_sin_table`."""
        if descriptor not in self.tables:
            cos, sin = cos_sin_table(self.positions, descriptor)
            self.tables[descriptor] = cos.to(self.device), sin.to(self.device)
        return self.tables[descriptor]

    def rotate(self, keys: Tensor, descriptor: Positions) -> Tensor:
        """Keys [T, H, D] as cached at the positions, of position-free keys."""
        return kernels.rotate(keys, *self.table(descriptor), descriptor.interleaved)

    def unrotate(self, keys: Tensor, descriptor: Positions) -> Tensor:
        """Position-free keys [T, H, D] of keys as cached at the positions."""
        return kernels.unrotate(keys, *self.table(descriptor), descriptor.interleaved)


@functools.lru_cache
@torch.inference_mode(False)  # else tables made while serving could not take part in a calibration
def _rows(descriptor: Positions, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 … count-1, which all layers of a model share."""
    if descriptor.scheme not in SCHEMES:
        raise UnsupportedModel(
            "unknown positional scheme", found=descriptor.scheme, expected=sorted(SCHEMES)
        )
    return SCHEMES[descriptor.scheme](torch.arange(count).float(), descriptor)


def unrotate(keys: Tensor, positions: Tensor, descriptor: Positions) -> Tensor:
    """Position-free keys [T, H, D] float32 of keys as cached at these positions [T]."""
    return kernels.unrotate(keys, *cos_sin_table(positions, descriptor), descriptor.interleaved)


def rotate(keys: Tensor, positions: Tensor, descriptor: Positions) -> Tensor:
    """Keys [T, H, D] float32 as cached at these positions [T], of position-free keys."""
    return kernels.rotate(keys, *cos_sin_table(positions, descriptor), descriptor.interleaved)


def rerotate(keys: Tensor, offset: int, descriptor: Positions) -> Tensor:
    """Keys [T, H, D] as cached, moved by `offset` positions; unchanged, bit for bit, by none.

    Rotations add up, so one position's table moves all keys; `scale` is in the keys already.

    Raises:
        UnsupportedModel: learned positions, which cannot be moved.
    """
    if not offset:
        return keys
    cos, sin = offset_angles(offset, descriptor)
    return kernels.rotate(
        keys, cos.expand(len(keys), -1), sin.expand(len(keys), -1), descriptor.interleaved
    )


def offset_angles(offset: int, descriptor: Positions) -> tuple[Tensor, Tensor]:
    """cos and sin [1, C] that move a key as cached by `offset` positions.

    Raises:
        UnsupportedModel: learned positions, which cannot be moved.
    """
    if descriptor.additive:
        raise UnsupportedModel(
            "states with learned positions cannot be moved",
            found=f"an offset of {offset}",
            expected="the positions that they were computed at",
        )
    cos, sin = cos_sin_table(
        torch.tensor([abs(offset)]), descriptor.model_copy(update={"scale": None})
    )
    return cos, sin if offset > 0 else -sin
