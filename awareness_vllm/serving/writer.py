"""States into a CPU's pages, by vLLM's own operator: only that knows how they are packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awareness_vllm.geometry import Geometry
from awareness_vllm.positions import shift
from awareness_vllm.serving.pages import layer_index, slice_of_rank
from awareness_vllm.serving.scheduler import SKIP


@dataclass(frozen=True)
class Writer:
    """vLLM's attention `layers` by their names, and each one's KV cache group."""

    layers: Mapping[str, Any]
    groups: Mapping[str, int]
    geometry: Geometry
    dtype: torch.dtype

    def place(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        begin: int,
        offset: int,
        slots: Sequence[Tensor],
    ) -> None:
        """Write a memory's tokens from `begin` on, as many as there are slots.

        Args:
            keys, values: per layer [T, H, D], the whole memory's.
            offset: by how many positions they are moved.
            slots: per KV cache group [N], SKIP where a token has none.
        """
        end, held = begin + len(slots[0]), [with_slots(group) for group in slots]
        for name, group in self.groups.items():
            index, (where, real) = layer_index(name), held[group]
            key, value = (states[index][begin:end][where] for states in (keys, values))
            self.write(name, shift(key, offset, self.geometry.layers[index].positions), value, real)

    def write(self, name: str, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Scatter one layer's key and value [N, H, D] into slots [N]."""
        if not len(slots):
            return
        layer = self.layers[name]
        heads = slice_of_rank(key.shape[1], layer.num_kv_heads)
        device = layer.kv_cache.device
        layer.impl.do_kv_cache_update(
            layer,
            key[:, heads].to(device, self.dtype).contiguous(),
            value[:, heads].to(device, self.dtype).contiguous(),
            layer.kv_cache,
            slots.to(device),
        )

    def bytes_in(self, slots: Sequence[Tensor]) -> int:
        """Bytes of cache that each KV cache group's slots stand for, in all of its layers."""
        written = [int((group != SKIP).sum()) for group in slots]
        total = 0
        for name, group in self.groups.items():
            cache = self.layers[name].kv_cache  # [B, H, N, K|V]
            total += cache[0].numel() * cache.element_size() // cache.shape[2] * written[group]
        return total


def with_slots(slots: Tensor) -> tuple[slice | Tensor, Tensor]:
    """Which of some tokens have a slot, and the slots; all of them are no copy."""
    real = slots != SKIP
    return (slice(None), slots) if real.all() else (real, slots[real])
