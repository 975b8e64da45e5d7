"""What vLLM calls its layers, which heads this process has of them, and where their pages are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from awareness_vllm.align.paged import Pages
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import cos_sin_table
from awareness_vllm.serving.resolver import Memories

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
ROTATIONS = 1024
"""Positions whose angles tell one rotary embedding from another."""
FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""vLLM keeps float8 as bytes; its names of the formats."""


def layer_index(name: str) -> int:
    """The index of a layer in the model, from vLLM's name of its attention module: the one number
    in it, whether its parent is called layers, or h (GPT-2, BLOOM, Falcon)."""
    found = NUMBER.findall(name)
    if len(found) != 1:
        raise UnsupportedModel(
            "cannot tell a layer's index",
            found=name,
            expected="a name with one number, like model.layers.7.self_attn",
        )
    return int(found[0])


def check_layers(memories: Memories, groups: dict[str, int]) -> None:
    """Refuse at start a server whose cached layers are not those of the model's geometry."""
    found = sorted(layer_index(name) for name in groups)
    if not set(found) <= set(range(len(memories.geometry.layers))):
        raise UnsupportedModel(
            "the server's KV cache has other layers than the model's config",
            found=found,
            expected=f"0 … {len(memories.geometry.layers) - 1}",
        )


def check_rotations(model: torch.nn.Module, geometry: Geometry, names: Iterable[str]) -> None:
    """Refuse at start a model that turns its keys otherwise than its config was understood, as far
    as its attention layers show their tables: memories would be moved and mapped wrongly."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        positions = geometry.layers[layer_index(name)].positions
        rotary = getattr(modules.get(name.rpartition(".")[0]), "rotary_emb", None)
        turns = getattr(rotary, "cos_sin_cache", None)
        if turns is None or not positions.rotary_dim:  # or it has a table, and makes no use of it
            continue
        rows = torch.arange(min(len(turns), ROTATIONS))
        ours = torch.cat(cos_sin_table(rows, positions), dim=-1).to(turns)
        close = 2 * torch.finfo(turns.dtype).eps  # another device's cosines, rounded
        same = ours.shape[1] == turns.shape[1] and torch.allclose(
            ours, turns[: len(rows)], rtol=0, atol=close
        )
        if not same or getattr(rotary, "is_neox_style", True) == positions.interleaved:
            raise UnsupportedModel(
                f"layer {name} turns its keys otherwise than {geometry.name}'s config says",
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
    """A layer's pages as the CUDA backends lay them out: [B, H, N, K|V]."""
    cache = layer.kv_cache
    if cache.dtype == torch.uint8:
        cache = cache.view(FLOAT8[layer.kv_cache_dtype])
    keys, values = cache.transpose(1, 2).split(layer.head_size, dim=-1)
    return Pages(keys, values, layer._k_scale_float, layer._v_scale_float)
