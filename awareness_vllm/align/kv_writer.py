"""The writer of states into paged blocks on a CPU, by vLLM's own operator, which packs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rerotate

Layers = Sequence[Tensor] | Mapping[int, Tensor]
"""Keys or values [T, H, D] by the layer's index."""


@dataclass(frozen=True)
class KVWriter:
    """A writer into vLLM's attention `layers`; they, their KV cache `groups` and this rank's
    `heads` are by the layer's index in the model."""

    layers: Mapping[int, Any]
    groups: Mapping[int, int]
    heads: Mapping[int, slice]
    geometry: Geometry
    dtype: torch.dtype

    def place(
        self,
        keys: Layers,
        values: Layers,
        begin: int,
        offset: int,
        slot_mapping: Sequence[Tensor],
        *,
        length: int | None = None,
    ) -> None:
        """Write a memory's tokens from `begin` on, one for each slot, moved by `offset` positions.

        Args:
            keys, values: per layer [T, H, D], of the whole memory, or of a passage; with a `length`
                T some may have the last rows only.
            slot_mapping: per KV cache group [N] int64, negative where a token has no slot.

        Raises:
            UnsupportedModel: a token with a slot whose row is not there.
        """
        for i, key, value, slots in self.rows(keys, values, begin, slot_mapping, length):
            self.write(i, rerotate(key, offset, self.geometry.layers[i].positions), value, slots)

    def rows(
        self,
        keys: Layers,
        values: Layers,
        begin: int,
        slot_mapping: Sequence[Tensor],
        length: int | None,
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Each layer's index, the keys and values [N, H, D] of the tokens that have a slot, and
        their slots [N]. Args and errors as of `place`."""
        end, mapped = begin + len(slot_mapping[0]), [mapped_tokens(g) for g in slot_mapping]
        for i, group in self.groups.items():
            tokens, slots = mapped[group]
            if lost := 0 if length is None else length - len(keys[i]):
                tokens, slots = _beyond(lost - begin, slot_mapping[group], i)
            first, last = max(0, begin - lost), max(0, end - lost)
            key, value = (states[i][first:last][tokens] for states in (keys, values))
            yield i, key, value, slots

    def write(self, index: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Write one layer's keys and values [N, H, D] into slots [N]."""
        if not len(slot_mapping):
            return
        layer, heads = self.layers[index], self.heads[index]
        device = layer.kv_cache.device
        layer.impl.do_kv_cache_update(
            layer,
            key[:, heads].to(device, self.dtype).contiguous(),
            value[:, heads].to(device, self.dtype).contiguous(),
            layer.kv_cache,
            slot_mapping.to(device),
        )

    def bytes_in(self, slot_mapping: Sequence[Tensor]) -> int:
        """The bytes of the slots of all KV cache groups, in all of their layers."""
        written = [int((group >= 0).sum()) for group in slot_mapping]
        total = 0
        for i, group in self.groups.items():
            cache = self.layers[i].kv_cache
            total += cache[0].nbytes // block_tokens(cache) * written[group]
        return total


def _beyond(lost: int, slot_mapping: Tensor, layer: int) -> tuple[slice | Tensor, Tensor]:
    """`mapped_tokens` of what follows the first `lost` tokens, which must have no slots."""
    missing = max(0, lost)
    if (slot_mapping[:missing] >= 0).any():
        raise UnsupportedModel(
            f"layer {layer} keeps no more than what later tokens can see of this memory",
            found=f"a slot for a token before the last {len(slot_mapping) - missing}",
            expected="slots within the window",
        )
    return mapped_tokens(slot_mapping[missing:])


def block_tokens(cache: Tensor) -> int:
    """Tokens of a block in a layer's cache [B, H, N, K|V], however a backend packs them in it."""
    return cache.shape[2]


def mapped_tokens(slot_mapping: Tensor) -> tuple[slice | Tensor, Tensor]:
    """An index of the tokens that have a slot, and their slots; a slice, which copies nothing,
    where all have one."""
    mapped = slot_mapping >= 0
    return (slice(None), slot_mapping) if mapped.all() else (mapped, slot_mapping[mapped])
