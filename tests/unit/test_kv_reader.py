"""Blocks that vLLM's own CPU operator has written are read back bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_layers import COUNT, EMPTY, cpu_layer, random_states

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.serving.connector.kv_layout import NULL_BLOCK, KVLayout
from awareness_vllm.serving.connector.kv_reader import block_layout, read_kv, read_slots
from awareness_vllm.serving.connector.scheduler import SaveSpec

pytestmark = pytest.mark.unit

LAYOUTS = [
    pytest.param(torch.bfloat16, 32, 64, "vec", id="bf16"),
    pytest.param(torch.float32, 32, 64, "vec", id="fp32"),
    pytest.param(torch.float16, 64, 32, "vec", id="fp16"),
    pytest.param(torch.bfloat16, 16, 80, "vec16", id="bf16, odd heads"),
    pytest.param(torch.bfloat16, 32, 64, "amx", id="bf16, AMX"),
]


@pytest.mark.parametrize(("dtype", "size", "width", "isa"), LAYOUTS)
def test_slots_are_read_back_bit_for_bit(
    dtype: torch.dtype, size: int, width: int, isa: str
) -> None:
    layer = cpu_layer(dtype, size, width, isa)
    order = torch.randperm(COUNT * size, generator=torch.Generator().manual_seed(0))
    slot_mapping, others = order[:50], order[50:]
    keys, values = (random_states(len(order), width, dtype, seed) for seed in (1, 2))
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, order)
    new_keys, new_values = (random_states(50, width, dtype, seed) for seed in (3, 4))
    layer.impl.do_kv_cache_update(layer, new_keys, new_values, layer.kv_cache, slot_mapping)
    before = layer.kv_cache.clone()
    key, value = read_slots(layer, slot_mapping)
    assert key.dtype == dtype
    assert torch.equal(key, new_keys)
    assert torch.equal(value, new_values)
    key, value = read_slots(layer, others)
    assert torch.equal(key, keys[50:])
    assert torch.equal(value, values[50:])
    assert torch.equal(layer.kv_cache, before)


@pytest.mark.parametrize(("dtype", "size", "width", "isa"), LAYOUTS)
def test_a_layout_places_every_element_once(
    dtype: torch.dtype, size: int, width: int, isa: str
) -> None:
    layer = cpu_layer(dtype, size, width, isa)
    positions = torch.cat([block_layout(layer, part) for part in ("key", "value")])
    assert torch.equal(positions.sort().values, torch.arange(layer.kv_cache[0].numel()))
    assert (layer.kv_cache == EMPTY).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_quantised_cache_cannot_be_captured(dtype: torch.dtype) -> None:
    layer = SimpleNamespace(kv_cache=torch.zeros(1, 1, 32, 8, dtype=dtype), num_kv_heads=1)
    with pytest.raises(UnsupportedModel, match="quantised"):
        block_layout(layer, "key")


@pytest.mark.parametrize(
    ("block_ids", "message"), [([3, NULL_BLOCK], "no longer holds"), ([3, 1], "not all heads")]
)
def test_a_request_that_is_not_all_here_cannot_be_captured(
    block_ids: list[int], message: str, geometry: Geometry
) -> None:
    layers: dict[str, Any] = {"m.layers.0.attn": cpu_layer(torch.bfloat16, 32, 64, "vec")}
    layout = KVLayout(layers, {"m.layers.0.attn": 0}, [32])
    with pytest.raises(UnsupportedModel, match=message):
        read_kv(layout, geometry, SaveSpec("s", 0, 40, 40, (block_ids,)))
