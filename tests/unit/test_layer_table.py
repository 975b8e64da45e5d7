"""Which layers of vLLM's KV cache are the served model's, their windows and their scales."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from connector_stubs import scheduled
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from awareness_vllm.align.paged import Pages
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.serving.connector.kv_layout import NULL_BLOCK, PAD_SLOT_ID, KVLayout
from awareness_vllm.serving.connector.scheduler import ConnectorScheduler

pytestmark = pytest.mark.unit

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 8,
    "dtype": torch.bfloat16,
}
FULL = FullAttentionSpec(**SHAPE)
WINDOWED = SlidingWindowSpec(**SHAPE, sliding_window=32)
TARGET = [f"model.layers.{i}.self_attn.attn" for i in range(3)]


def config_of(*groups: tuple[KVCacheSpec, list[str]]) -> KVCacheConfig:
    specs = [KVCacheGroupSpec(layer_names=names, kv_cache_spec=spec) for spec, names in groups]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=specs)


def layout_of(
    built: list[str], cache: KVCacheConfig, *, drafting: bool = True, count: int = 3
) -> KVLayout:
    """The layout of a process that has built these layers, in this order."""
    table = {name: SimpleNamespace(name=name) for name in built}
    vllm_config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=table),
        speculative_config=object() if drafting else None,
    )
    return KVLayout.from_vllm(vllm_config, cache, count)


# Draft models


@pytest.mark.parametrize(
    "draft",
    [
        ["draft_model.model.layers.0.self_attn.attn", "draft_model.model.layers.1.self_attn.attn"],
        ["mtp.layers.0.self_attn.attn"],
        ["model.layers.3.self_attn.attn"],  # EAGLE goes on counting
        ["model.mtp.layers.1.mtp_block.self_attn.attn"],
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["draft group first", "last"])
def test_a_draft_models_layers_are_left_alone(draft: list[str], first: bool) -> None:
    groups = [(FULL, TARGET), (FULL, draft)]
    layout = layout_of([*TARGET, *draft], config_of(*(groups[::-1] if first else groups)))
    assert list(layout.layers) == list(layout.groups) == TARGET
    assert [layer.name for layer in layout.layers.values()] == TARGET
    # Its group's blocks come with every request, and none of them has a slot.
    ours = int(first)
    slots = layout.slot_mappings(([4, 5], [6, 7]), 2, 20)
    assert (slots[1 - ours] == PAD_SLOT_ID).all()
    assert slots[ours].tolist() == [[4, 6][ours] * 16 + i for i in range(2, 16)] + [
        [5, 7][ours] * 16 + i for i in range(4)
    ]


def test_a_draft_layer_in_a_group_of_ours_is_left_alone() -> None:
    draft = "draft_model.model.layers.1.self_attn.attn"
    layout = layout_of([*TARGET, draft], config_of((FULL, [draft, *TARGET])))
    assert list(layout.layers) == TARGET


def test_a_layer_that_vllm_calls_a_drafts_is_one_whatever_its_name() -> None:
    """vLLM 0.33 says so in its spec."""
    draft = replace(FULL)
    object.__setattr__(draft, "is_draft", True)
    specs = {TARGET[0]: FULL, TARGET[1]: draft, TARGET[2]: FULL}
    for group in (
        [(UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs), TARGET)],
        [(FULL, [TARGET[0], TARGET[2]]), (draft, [TARGET[1]])],
    ):
        layout = layout_of(TARGET, config_of(*group), drafting=False)
        assert list(layout.layers) == [TARGET[0], TARGET[2]]


@pytest.mark.parametrize("drafting", [True, False])
def test_two_layers_of_one_number_are_refused(drafting: bool) -> None:
    built = [*TARGET, "model.layers.1.cross_attn.attn"]
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.self_attn.*layers\.1\.cross_attn"):
        layout_of(built, config_of((FULL, built)), drafting=drafting)


def test_without_a_draft_model_another_prefix_is_no_draft() -> None:
    built = [*TARGET, "mtp.layers.0.self_attn.attn"]
    with pytest.raises(UnsupportedModel, match="one number"):
        layout_of(built, config_of((FULL, built)), drafting=False)


# Windows


MIXED = UniformTypeKVCacheSpecs(
    block_size=16,
    kv_cache_specs={
        TARGET[0]: WINDOWED,
        TARGET[1]: replace(WINDOWED, num_kv_heads=4),
        TARGET[2]: replace(WINDOWED, head_size=16),
    },
)
"""The group of layers that differ in their heads."""


@pytest.mark.parametrize(
    ("spec", "window"),
    [
        (FULL, None),
        (WINDOWED, 32),
        (MIXED, 32),
        (UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={TARGET[0]: FULL}), None),
        # Without the hybrid allocator vLLM keeps the blocks outside of a window.
        (replace(FULL, sliding_window=32), None),
    ],
    ids=["full", "windowed", "windowed, mixed heads", "full, mixed heads", "no hybrid allocator"],
)
def test_both_halves_know_the_window_outside_of_which_blocks_are_given_back(
    spec: KVCacheSpec, window: int | None
) -> None:
    cache = config_of((spec, TARGET))
    layout = layout_of(TARGET, cache)
    assert (layout.windows, layout.block_sizes) == ([window], [16])
    assert layout.first_rows(100, 8) == dict.fromkeys(range(3), 48 if window else 0)
    scheduler = ConnectorScheduler.from_vllm(cache)
    # A prompt whose first 64 tokens the prefix cache brought, captured from its beginning.
    asked = scheduled({"key": "name"}, computed=64, step=16, tokens=80, ids=([*range(5)],))
    scheduler.plan_saves(asked, "key")
    (save,) = scheduler.take_step().saves
    assert save.block_ids == ([NULL_BLOCK] * 5 if window else [*range(5)],)


# Scales


def layer_with(cache: torch.Tensor, keys: list[float], values: list[float]) -> Any:
    """vLLM's attention layer, as its quantisation leaves the scales behind."""
    scales = [torch.tensor(scale if len(scale) > 1 else scale[0]) for scale in (keys, values)]
    return SimpleNamespace(
        kv_cache=cache, kv_cache_dtype="fp8", head_size=8, _k_scale=scales[0], _v_scale=scales[1],
        _k_scale_float=max(keys), _v_scale_float=max(values),
    )  # fmt: skip


def pages_with(dtype: torch.dtype, keys: list[float], values: list[float]) -> Pages:
    cache = torch.zeros(4, 2, 16, 16, dtype=dtype)
    layout = KVLayout({"m.layers.0.a": layer_with(cache, keys, values)}, {"m.layers.0.a": 0}, [16])
    (pages,) = layout.pages()
    assert pages.keys.shape == pages.values.shape == (4, 16, 2, 8)
    return pages


def test_each_head_has_its_own_scale() -> None:
    """vLLM's backends read the vector; the layer's one number is the largest of it."""
    pages = pages_with(torch.uint8, [0.5, 0.25], [2.0, 4.0])
    assert (pages.key_scale, pages.value_scale) == ((0.5, 0.25), (2.0, 4.0))
    assert pages.keys.dtype == torch.float8_e4m3fn


def test_a_layer_has_one_scale_or_none() -> None:
    pages = pages_with(torch.uint8, [0.5], [2.0])
    assert (pages.key_scale, pages.value_scale) == (0.5, 2.0)
    # Some checkpoints bring scales, and their cache is in the model's dtype all the same.
    for scales in ([0.5], [0.5, 0.25]):
        pages = pages_with(torch.bfloat16, scales, scales)
        assert (pages.key_scale, pages.value_scale) == (1.0, 1.0)
