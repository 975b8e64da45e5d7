"""The layout of vLLM's KV cache: names of layers, heads of this rank, slots and pages of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from awareness_vllm.align.paged import Pages
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import cos_sin_table

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

NULL_BLOCK = -1
"""The ID of a block that holds nothing: it is outside a sliding window."""
PAD_SLOT_ID = -1
"""The slot of a token that is not to be written: its block is a null block."""
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
WINDOWED = ("SlidingWindowSpec",)
"""vLLM's specs of groups that give blocks back: without the hybrid allocator a window is no more
than a field of another spec."""
ROTATIONS = 1024
"""Positions whose angles tell one rotary embedding from another."""
FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""vLLM keeps float8 as bytes; its names of the formats."""


@dataclass(frozen=True)
class KVLayout:
    """The attention layers of this process, by vLLM's names, the KV cache group of each (`groups`),
    and for each group the tokens of a block (`block_sizes`) and the window outside of which vLLM
    gives blocks back (`windows`; None where it keeps all of them, as without the hybrid
    allocator)."""

    layers: Mapping[str, Any]
    groups: Mapping[str, int]
    block_sizes: Sequence[int]
    windows: Sequence[int | None] = ()

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> KVLayout:
        cache_groups = kv_cache_config.kv_cache_groups
        groups = {name: g for g, group in enumerate(cache_groups) for name in group.layer_names}
        layers = vllm_config.compilation_config.static_forward_context
        specs = [group.kv_cache_spec for group in cache_groups]
        block_sizes = [spec.block_size for spec in specs]
        windows = [
            getattr(spec, "sliding_window", None) if type(spec).__name__ in WINDOWED else None
            for spec in specs
        ]
        return cls({name: layers[name] for name in groups}, groups, block_sizes, windows)

    def first_rows(self, tokens: int, computed: int) -> dict[int, int]:
        """The first of a memory's `tokens` tokens whose row each layer must keep, by its index in
        the model, where at least the last `computed` tokens before a question may be computed:
        whatever lies in a block that a windowed layer then still has."""
        first: dict[int, int] = {}
        for name, group in self.groups.items():
            window = self.windows[group] if self.windows else None
            size = self.block_sizes[group]
            seen = 0 if window is None else max(0, tokens - computed - window + 1)
            first[layer_index(name)] = seen // size * size
        return first

    def slot_mappings(
        self, block_ids: Sequence[Sequence[int]], begin: int, end: int
    ) -> list[Tensor]:
        """Per KV cache group, the slots [end - begin] of positions begin … end-1, from its blocks'
        IDs."""
        pairs = zip(block_ids, self.block_sizes, strict=True)
        return [slot_mapping(ids, size, begin, end) for ids, size in pairs]

    def check(self, geometry: Geometry) -> None:
        """Refuse cached layers that the model's geometry lacks. Raises UnsupportedModel."""
        indices = sorted(layer_index(name) for name in self.groups)
        if not set(indices) <= set(range(len(geometry.layers))):
            raise UnsupportedModel(
                "the server's KV cache has other layers than the model's config",
                found=indices,
                expected=f"0 … {len(geometry.layers) - 1}",
            )

    def pages(self) -> list[Pages]:
        """Each layer's pages, as the CUDA backends lay them out."""
        return [pages_of(layer) for layer in self.layers.values()]


def slot_mapping(block_ids: Sequence[int], size: int, begin: int, end: int) -> Tensor:
    """Slots [end - begin] int64 of a prompt's positions begin … end-1, PAD_SLOT_ID in null blocks.

    Args:
        block_ids: of the prompt's blocks of `size` tokens, in order.

    Raises:
        ValueError: too few blocks.
    """
    first, last = begin // size, -(-end // size)
    if last > len(block_ids):
        raise ValueError(f"{len(block_ids)} blocks of {size} tokens hold no {end} tokens")
    blocks = torch.tensor(block_ids[first:last], dtype=torch.int64)[:, None]
    slots = blocks * size + torch.arange(size)
    slots = slots.masked_fill(blocks == NULL_BLOCK, PAD_SLOT_ID).flatten()
    return slots[begin - first * size : end - first * size]


def layer_index(name: str) -> int:
    """The index of a layer in the model, from vLLM's name of its attention module: the one number
    in it, whether its parent is called layers, or h (GPT-2, BLOOM, Falcon).

    Raises:
        UnsupportedModel: no number, or several.
    """
    numbers = LAYER_NUMBER.findall(name)
    if len(numbers) != 1:
        raise UnsupportedModel(
            "a layer's index is unclear from its name",
            found=name,
            expected="a name with one number, like model.layers.7.self_attn",
        )
    return int(numbers[0])


def check_rotations(model: torch.nn.Module, geometry: Geometry, names: Iterable[str]) -> None:
    """Refuse at start a model that rotates its keys otherwise than its config was understood, as
    far as its attention layers show their tables: memories would be moved and mapped wrongly.

    Raises:
        UnsupportedModel
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        positions = geometry.layers[layer_index(name)].positions
        rotary = getattr(modules.get(name.rpartition(".")[0]), "rotary_emb", None)
        table = getattr(rotary, "cos_sin_cache", None)
        if table is None or not positions.rotary_dim:  # or it has a table that it does not use
            continue
        rows = torch.arange(min(len(table), ROTATIONS))
        expected = torch.cat(cos_sin_table(rows, positions), dim=-1).to(table)
        tolerance = 2 * torch.finfo(table.dtype).eps  # another device's cosines, rounded
        same = expected.shape[1] == table.shape[1] and torch.allclose(
            expected, table[: len(rows)], rtol=0, atol=tolerance
        )
        if not same or getattr(rotary, "is_neox_style", True) == positions.interleaved:
            raise UnsupportedModel(
                f"layer {name} rotates its keys otherwise than {geometry.name}'s config says",
                found=rotary,
                expected=positions,
            )


def slice_of_rank(total: int, local: int) -> slice:
    """This tensor-parallel rank's KV heads; replicated where ranks outnumber them."""
    if total == local:
        return slice(None)
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    begin = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
    return slice(begin, begin + local)


def pages_of(layer: Any) -> Pages:
    """A layer's pages from its cache [B, H, N, K|V], the layout of the CUDA backends."""
    cache = layer.kv_cache
    if cache.dtype == torch.uint8:
        cache = cache.view(FLOAT8[layer.kv_cache_dtype])
    keys, values = cache.transpose(1, 2).split(layer.head_size, dim=-1)
    return Pages(keys, values, layer._k_scale_float, layer._v_scale_float)
