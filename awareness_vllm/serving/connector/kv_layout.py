"""The layout of vLLM's KV cache: names of layers, heads of this rank, slots and pages of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from awareness_vllm.align.paged import Pages
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import cos_sin_table

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

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
Scale = float | Sequence[float]


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
    def from_vllm(
        cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, count: int
    ) -> KVLayout:
        """The layout of a process that serves a model of `count` layers, without its draft model.

        Raises:
            UnsupportedModel: layers whose numbers do not tell them apart.
        """
        cache_groups = kv_cache_config.kv_cache_groups
        groups = {name: g for g, group in enumerate(cache_groups) for name in group.layer_names}
        drafts = {
            name
            for name, g in groups.items()
            if getattr(spec_of(cache_groups[g].kv_cache_spec, name), "is_draft", False)
        }
        table = vllm_config.compilation_config.static_forward_context
        drafting = vllm_config.speculative_config is not None
        built = [name for name in table if name in groups and name not in drafts]
        names = served_layers(built, count, drafting=drafting)
        return cls(
            {name: table[name] for name in names},
            {name: groups[name] for name in names},
            [group.kv_cache_spec.block_size for group in cache_groups],
            windows_of(kv_cache_config),
        )

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
        IDs; all PAD_SLOT_ID in a group without a layer of ours, such as a draft model's."""
        used = set(self.groups.values()) if self.groups else range(len(self.block_sizes))
        return [
            slot_mapping(ids, size, begin, end)
            if group in used
            else torch.full((end - begin,), PAD_SLOT_ID)
            for group, (ids, size) in enumerate(zip(block_ids, self.block_sizes, strict=True))
        ]

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
        return [pages_of(layer, *self.scales[name]) for name, layer in self.layers.items()]

    @cached_property
    def scales(self) -> dict[str, tuple[Scale, Scale]]:
        """The factors from stored to real keys and values of each layer, read once: those of single
        heads lie on the device."""
        return {name: scales_of(layer) for name, layer in self.layers.items()}


def spec_of(spec: KVCacheSpec, name: str) -> KVCacheSpec:
    """A layer's own spec, where those of a group differ (UniformTypeKVCacheSpecs)."""
    specs: Mapping[str, KVCacheSpec] = getattr(spec, "kv_cache_specs", {})
    return specs.get(name, spec)


def windows_of(kv_cache_config: KVCacheConfig) -> list[int | None]:
    """Of each KV cache group the window outside of which vLLM gives blocks back, None where it
    keeps all of them. Layers of one group have one window."""
    windows: list[int | None] = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        spec = getattr(spec, "first_spec", spec)
        windowed = any(kind.__name__ in WINDOWED for kind in type(spec).__mro__)
        windows.append(getattr(spec, "sliding_window", None) if windowed else None)
    return windows


def served_layers(built: Sequence[str], count: int, *, drafting: bool) -> list[str]:
    """The served model's layers among those that were `built`, in order.

    With `drafting` a draft model's were built after them. Its layers have the served model's
    numbers once more under another prefix (`draft_model.model.layers.0`, `mtp.layers.0`), or go on
    counting (EAGLE).

    Raises:
        UnsupportedModel: a number is unclear, or two layers have it.
    """
    if drafting and built:
        prefix = prefix_of(built[0])
        built = [n for n in built if prefix_of(n) == prefix and layer_index(n) < count]
    by_index: dict[int, str] = {}
    for name in built:
        if (other := by_index.setdefault(layer_index(name), name)) != name:
            raise UnsupportedModel(
                "two layers of the server's KV cache have one number",
                found=f"{other} and {name}",
                expected="a number of its own for each layer",
                remedy="start without a draft model or MTP" if drafting else None,
            )
    return list(by_index.values())


def prefix_of(name: str) -> str:
    """What precedes the first number in a layer's name."""
    found = LAYER_NUMBER.search(name)
    return name[: found.start()] if found else name


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


def scales_of(layer: Any) -> tuple[Scale, Scale]:
    """The factors from stored to real keys and values, one for the layer or one for each head of
    this rank. vLLM's own number for a layer with several is the largest; one without a quantised
    cache ignores those that its checkpoint brings."""
    if layer.kv_cache.dtype.itemsize > 1:
        return 1.0, 1.0
    if layer._k_scale.numel() == 1:
        return layer._k_scale_float, layer._v_scale_float
    return tuple(layer._k_scale.tolist()), tuple(layer._v_scale.tolist())


def pages_of(layer: Any, key_scale: Scale, value_scale: Scale) -> Pages:
    """A layer's pages from its cache [B, H, N, K|V], the layout of the CUDA backends, with the
    factors from stored to real values."""
    cache = layer.kv_cache
    if cache.dtype == torch.uint8:
        cache = cache.view(FLOAT8[layer.kv_cache_dtype])
    keys, values = cache.transpose(1, 2).split(layer.head_size, dim=-1)
    return Pages(keys, values, key_scale, value_scale)  # type: ignore[arg-type]
