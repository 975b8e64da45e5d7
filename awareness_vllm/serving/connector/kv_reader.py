"""Keys and values of a request, read back out of the paged blocks exactly, whatever their packing.

Backends pack blocks differently (vLLM's CPU backend transposes keys, or interleaves them for AMX).
Instead of knowing every packing, the layout is learned from vLLM's own writer: numbered elements
are written into a scratch block, and where each number lands is where that element is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from awareness_vllm.align.kv_writer import block_tokens
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.connector.kv_layout import PAD_SLOT_ID, KVLayout, layer_index
from awareness_vllm.serving.connector.scheduler import SaveSpec

CAPTURE_KEY = "awareness_capture"
"""Our key in a capturing request's `kv_transfer_params`. Its value is a key that the server has
announced to the workers, or the path that an offline engine's own process has signed; or
`{"name": KEY, "begin": POSITION}`, which leaves out the states before that position."""

DIGIT = 128
"""Numbers are written as digits of this base: integers that bfloat16 and float16 hold exactly."""


def read_kv(
    layout: KVLayout, geometry: Geometry, save: SaveSpec, *, whole: bool = True
) -> dict[str, Tensor]:
    """`layers.i.key` and `layers.i.value` [T, H, D] of what one step computed, on the host.

    Args:
        whole: whether all heads are wanted, not only those of this rank.

    Raises:
        UnsupportedModel: a layer has given back blocks outside of its window, or a rank holds only
            some of the heads.
    """
    tensors: dict[str, Tensor] = {}
    slot_mappings = layout.slot_mappings(save.block_ids, save.begin, save.end)
    for name, layer in layout.layers.items():
        slot_mapping = slot_mappings[layout.groups[name]]
        if (slot_mapping == PAD_SLOT_ID).any():
            raise UnsupportedModel(
                f"layer {name} no longer holds the whole context",
                found="blocks outside its sliding window were given back",
                expected="a prompt of which the prefix cache holds nothing",
                remedy="send it with a new cache_salt, or start with "
                "--disable-hybrid-kv-cache-manager",
            )
        key, value = read_slots(layer, slot_mapping)
        index = layer_index(name)
        heads = geometry.layers[index].heads
        if whole and key.shape[1] != heads:
            raise UnsupportedModel(
                f"layer {name} has not all heads here",
                found=f"{key.shape[1]} of {heads} KV heads",
                expected="a server without tensor parallelism",
                remedy="capture with `awareness capture`, or on a server with one rank",
            )
        tensors |= {tensor_name(index, "key"): key, tensor_name(index, "value"): value}
    return tensors


def read_slots(layer: Any, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [N, H, D] in these slots [N] of a layer's cache, on the host."""
    cache, heads = layer.kv_cache, layer.num_kv_heads
    size = block_tokens(cache)
    layouts = [block_layout(layer, part) for part in ("key", "value")]
    blocks, inverse = torch.unique(slot_mapping // size, return_inverse=True)
    raw = cache[blocks.to(cache.device)].flatten(1).cpu()
    begins = (inverse * raw.shape[1])[:, None, None]
    key, value = (
        raw.take(begins + order.view(size, heads, -1)[slot_mapping % size]) for order in layouts
    )
    return key, value


def block_layout(layer: Any, part: str) -> Tensor:
    """The flat position in one block of each element of its `part` ("key" or "value"): [N * H * D],
    learned once from each writer.

    Raises:
        UnsupportedModel: a quantised cache.
    """
    cache = layer.kv_cache
    if cache.dtype.itemsize < 2:
        raise UnsupportedModel(
            "cannot capture from a quantised KV cache",
            found=str(cache.dtype),
            expected="a cache in the model's own dtype",
            remedy="start without --kv-cache-dtype",
        )
    known: dict[Any, Tensor] = vars(layer.impl).setdefault("awareness_layouts", {})
    about = part, layer.num_kv_heads, cache.shape[1:], cache.stride()[1:], cache.dtype
    if about not in known:
        known[about] = _learned_layout(layer, part)
    return known[about]


def _learned_layout(layer: Any, part: str) -> Tensor:
    """`block_layout`, from what the layer's writer does to a scratch block."""
    scratch = torch.empty_like(layer.kv_cache[:1])
    size, heads = block_tokens(scratch), layer.num_kv_heads
    count = scratch.numel() // 2
    elements = torch.arange(count, device=scratch.device).view(size, heads, -1)
    slot_mapping = torch.arange(size, device=scratch.device)
    numbers = torch.zeros(scratch.numel(), dtype=torch.int64, device=scratch.device)
    weight = 1
    while weight < count:
        digits = (elements // weight % DIGIT).to(scratch.dtype)
        other = torch.full_like(digits, -1)
        states = (digits, other) if part == "key" else (other, digits)
        layer.impl.do_kv_cache_update(layer, *states, scratch, slot_mapping)
        raw = scratch.flatten().to(torch.int64)
        numbers += raw * weight
        weight *= DIGIT
    mine = raw >= 0
    positions = torch.arange(scratch.numel(), device=scratch.device)[mine]
    return positions[numbers[mine].argsort()].cpu()
