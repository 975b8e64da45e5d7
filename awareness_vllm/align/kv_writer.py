"""States into a CPU's pages, by vLLM's own operator: only that knows how they are packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rerotate


@dataclass(frozen=True)
class KVWriter:
    """vLLM's attention `layers`, their KV cache groups, and which `heads` this rank has of each, by
    the layer's index in the model."""

    layers: Mapping[int, Any]
    groups: Mapping[int, int]
    heads: Mapping[int, slice]
    geometry: Geometry
    dtype: torch.dtype

    def place(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        begin: int,
        offset: int,
        slot_mapping: Sequence[Tensor],
    ) -> None:
        """Write a memory's tokens from `begin` on, as many as there are slots.

        Args:
            keys, values: per layer [T, H, D], the whole memory's.
            offset: by how many positions they are moved.
            slots: per KV cache group [N], negative where a token has none.
        """
        end, held = begin + len(slot_mapping[0]), [with_slots(group) for group in slot_mapping]
        for i, group in self.groups.items():
            where, real = held[group]
            key, value = (states[i][begin:end][where] for states in (keys, values))
            self.write(i, rerotate(key, offset, self.geometry.layers[i].positions), value, real)

    def write(self, index: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Scatter one layer's key and value [N, H, D] into slots [N]."""
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
        """Bytes of cache that each KV cache group's slots stand for, in all of its layers."""
        written = [int((group >= 0).sum()) for group in slot_mapping]
        total = 0
        for i, group in self.groups.items():
            cache = self.layers[i].kv_cache
            total += cache[0].nbytes // block_tokens(cache) * written[group]
        return total


def block_tokens(cache: Tensor) -> int:
    """Tokens of a block in a layer's cache [B, H, N, K|V], however a backend packs them in it."""
    return cache.shape[2]


def with_slots(slot_mapping: Tensor) -> tuple[slice | Tensor, Tensor]:
    """Which of some tokens have a slot, and the slots; all of them are no copy."""
    real = slot_mapping >= 0
    return (slice(None), slot_mapping) if real.all() else (real, slot_mapping[real])
