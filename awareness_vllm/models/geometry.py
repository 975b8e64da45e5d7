"""The geometry of a model's KV cache: layers, heads, positions of each layer, fingerprints."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import (
    AliasChoices,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from awareness_vllm.schema import FrozenModel, PlainName

MAX_LAYERS = 1024
Size = Annotated[int, Field(ge=1, le=1 << 31)]
"""A number of heads, elements, tokens: no larger than an int32 that counts them."""
Number = Annotated[float, Field(gt=0, lt=1e30)]
"""A positive parameter of a positional encoding."""


class Positions(FrozenModel):
    """One layer's positional encoding: the parameters from which its tables are rebuilt.

    `scheme` names a function of `awareness_vllm.models.rope`, which says which other fields it
    reads. Fields at their default are left out of manifests, so that older files keep their digest;
    `woven`, `slow` and `fast` are their names in version 0.1.
    """

    scheme: PlainName
    theta: Number | None = None
    rotary_dim: Annotated[int, Field(ge=0, le=1 << 16)] | None = None
    interleaved: bool = Field(False, validation_alias=AliasChoices("interleaved", "woven"))
    """Whether a rotated pair is two neighbouring dims (GPT-J), or dims `rotary_dim / 2` apart."""
    scale: Number | None = None
    """The factor of cosines and sines: YaRN's mscale, LongRoPE's attention factor."""
    factor: Number | None = None
    original: Size | None = None
    """Positions that the model was trained on, before its context was extended."""
    length: Size | None = None
    """The sequence length of a table of the dynamic scheme."""
    beta_slow: Number | None = Field(None, validation_alias=AliasChoices("beta_slow", "slow"))
    beta_fast: Number | None = Field(None, validation_alias=AliasChoices("beta_fast", "fast"))
    """Pairs that rotate less than `beta_slow` times in `original` positions are stretched, those
    that rotate more than `beta_fast` times are not; in between a ramp."""
    truncate: bool = True
    factors: tuple[Number, ...] | None = Field(None, max_length=1 << 12)
    """LongRoPE's factors of the pairs: the short or the long ones, whichever were in use."""

    @property
    def additive(self) -> bool:
        """Whether positions are added to the embeddings (learned: GPT-2, OPT). Keys and values of
        all layers then depend on them, and cannot be moved by an operation on the keys."""
        return self.scheme == "learned"

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: v for k, v in handler(self).items() if v != fields[k].default}


class LayerGeometry(FrozenModel):
    """One layer's cache: `heads` KV heads of `head_dim`, positions, sliding `window` in tokens."""

    heads: Size
    head_dim: Size
    positions: Positions
    window: Size | None = None

    @model_validator(mode="after")
    def _rotates_its_own_dims(self) -> Self:
        rotated = self.positions.rotary_dim or 0
        if rotated > self.head_dim or rotated % 2:
            raise ValueError(f"{rotated} rotated dims of {self.head_dim}")
        return self

    @property
    def width(self) -> int:
        """Elements of one token's key (or value): `heads * head_dim`."""
        return self.heads * self.head_dim


class Geometry(FrozenModel):
    """A model's KV cache and identity; `weights` and `tokenizer` are fingerprints (sha256)."""

    name: PlainName
    model_type: PlainName
    dtype: PlainName
    hidden_size: Size
    vocab_size: Size
    max_positions: int = Field(ge=1, lt=1 << 63)
    layers: tuple[LayerGeometry, ...] = Field(min_length=1, max_length=MAX_LAYERS)
    weights: str = Field(max_length=64)
    tokenizer: str = Field(max_length=64)

    @property
    def identity(self) -> str:
        """The name with both fingerprints, shortened: what tells models of one name apart."""
        return f"{self.name} (weights {self.weights[:12]}, tokenizer {self.tokenizer[:12]})"

    @property
    def fingerprint(self) -> str:
        """A digest of what `same_model` compares."""
        return _fingerprint(self.weights, self.tokenizer, self.layers)

    @property
    def additive(self) -> bool:
        """Whether the states depend on learned positions, and cannot be moved."""
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
        """Whether KV of one is KV of the other: same weights, tokenizer and layers."""
        return (self.weights, self.tokenizer, self.layers) == (
            other.weights,
            other.tokenizer,
            other.layers,
        )

    def same_weights(self, other: Geometry) -> bool:
        """Whether the models have the same known weights and layers, whatever their tokenizers."""
        same = (self.weights, self.layers) == (other.weights, other.layers)
        return same and bool(self.weights)

    def same_shape(self, other: Geometry) -> bool:
        """Whether the models are variants of one: same layers and tokenizer, other weights."""
        return (self.layers, self.tokenizer) == (other.layers, other.tokenizer)


@functools.lru_cache(256)
def _fingerprint(weights: str, tokenizer: str, layers: tuple[LayerGeometry, ...]) -> str:
    dumps = [layer.model_dump(mode="json") for layer in layers]
    return hashlib.sha256(json.dumps([weights, tokenizer, dumps]).encode()).hexdigest()


def by_depth(source: int, target: int) -> list[int]:
    """For each of `target` layers, the one of `source` layers at the same relative depth."""
    steps = max(1, target - 1)
    return [round(i * (source - 1) / steps) for i in range(target)]
