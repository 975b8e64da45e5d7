"""What a model's KV cache looks like: layers, heads, positions of each layer, and whose it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import (
    AliasChoices,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from awareness_vllm.schema import FrozenModel


class Positions(FrozenModel):
    """One layer's positional encoding: what is needed to rebuild its tables, and nothing else.

    `scheme` names a function of `awareness_vllm.models.rope`; which of the other fields it reads is
    said there. Fields at their default are left out of manifests, as they were before they existed;
    `woven`, `slow` and `fast` are what version 0.1 called three of them.
    """

    scheme: str
    theta: float | None = None
    rotary_dim: int | None = None
    interleaved: bool = Field(False, validation_alias=AliasChoices("interleaved", "woven"))
    """Whether the two dims of a turned pair stand side by side (GPT-J) or half a turn apart."""
    scale: float | None = None
    """What cosines and sines are multiplied by: YaRN's mscale, LongRoPE's attention factor."""
    factor: float | None = None
    original: int | None = None
    """The positions that the model was trained for, before its context was stretched."""
    length: int | None = None
    """The sequence length that a table of the dynamic scheme was made for."""
    beta_slow: float | None = Field(None, validation_alias=AliasChoices("beta_slow", "slow"))
    beta_fast: float | None = Field(None, validation_alias=AliasChoices("beta_fast", "fast"))
    """Pairs that rotate less than `beta_slow` times in `original` positions are stretched, those
    that rotate more than `beta_fast` times are not; between them goes a ramp."""
    truncate: bool = True
    factors: tuple[float, ...] | None = None
    """LongRoPE's, one for each pair: the short ones or the long ones, whichever were in use."""

    @property
    def additive(self) -> bool:
        """Whether positions were added to the embeddings (learned: GPT-2, OPT). Keys and values of
        all layers hold them then, and no operation on the keys moves such a state."""
        return self.scheme == "learned"

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: v for k, v in handler(self).items() if v != fields[k].default}


class LayerGeometry(FrozenModel):
    """One layer's cache: `heads` KV heads of `head_dim`, positions, sliding window in tokens."""

    heads: int
    head_dim: int
    positions: Positions
    window: int | None = None

    @property
    def width(self) -> int:
        """Elements of one token's key (or value): `heads * head_dim`."""
        return self.heads * self.head_dim


class Geometry(FrozenModel):
    """A model's KV cache and identity. `weights`, `tokenizer` are fingerprints, not signatures."""

    name: str
    model_type: str
    dtype: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerGeometry, ...]
    weights: str
    tokenizer: str

    @property
    def additive(self) -> bool:
        """Whether the states hold their positions themselves, and cannot be moved."""
        return any(layer.positions.additive for layer in self.layers)

    @property
    def key_width(self) -> int:
        """Elements of one token's keys over all layers."""
        return sum(layer.width for layer in self.layers)

    @property
    def width(self) -> int:
        """Elements of one token's keys and values over all layers."""
        return self.width_of(range(len(self.layers)))

    def width_of(self, layers: Iterable[int]) -> int:
        """Elements of one token's keys and values in some layers."""
        return 2 * sum(self.layers[i].width for i in layers)

    def same_model(self, other: Geometry) -> bool:
        """Whether KV of one is KV of the other: same weights, same tokenizer, same cache."""
        return (self.weights, self.tokenizer, self.layers) == (
            other.weights,
            other.tokenizer,
            other.layers,
        )

    def same_shape(self, other: Geometry) -> bool:
        """Whether states of one are states for the other, token by token: variants of one model."""
        return (self.layers, self.tokenizer) == (other.layers, other.tokenizer)


def by_depth(source: int, target: int) -> list[int]:
    """For each of so many target layers the source layer at the same share of the depth."""
    steps = max(1, target - 1)
    return [round(i * (source - 1) / steps) for i in range(target)]
