"""vLLM's names, slots and rotations, as the connector understands them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.serving.connector.kv_layout import (
    NULL_BLOCK,
    PAD_SLOT_ID,
    KVLayout,
    check_rotations,
    layer_index,
    slot_mapping,
)

pytestmark = pytest.mark.unit

# Slots


def slots_one_by_one(block_ids: list[int], size: int, begin: int, end: int) -> list[int]:
    """The oracle: a Python loop over positions."""
    slots = []
    for position in range(begin, end):
        block = block_ids[position // size]
        slots.append(PAD_SLOT_ID if block == NULL_BLOCK else block * size + position % size)
    return slots


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int, int]:
    """Block sizes and block IDs of some groups, and a range of positions in the blocks."""
    end = draw(st.integers(0, 100))
    sizes = draw(st.lists(st.sampled_from([1, 2, 16, 32, 48]), min_size=1, max_size=4))
    ids = []
    for size in sizes:
        count = -(-end // size) + draw(st.integers(0, 2))
        real = st.integers(1, 500) | st.integers(2**31, 2**40)
        group = draw(st.lists(real, min_size=count, max_size=count, unique=True))
        null = draw(st.sets(st.integers(0, max(count - 1, 0))))
        ids.append([NULL_BLOCK if i in null else block for i, block in enumerate(group)])
    return sizes, ids, draw(st.integers(0, end)), end


@pytest.mark.slow
@given(request=requests())
def test_every_position_has_its_slot(request: tuple[list[int], list[list[int]], int, int]) -> None:
    sizes, ids, begin, end = request
    groups = KVLayout({}, {}, sizes).slot_mappings(ids, begin, end)
    assert len(groups) == len(sizes)
    for size, block_ids, slots in zip(sizes, ids, groups, strict=True):
        assert (slots.dtype, slots.shape) == (torch.int64, (end - begin,))
        assert slots.tolist() == slots_one_by_one(block_ids, size, begin, end)
        real = slots[slots != PAD_SLOT_ID]
        assert len(real.unique()) == len(real)


def test_slots_of_a_null_block_and_a_partial_last_one() -> None:
    assert slot_mapping([9, 3], 4, 2, 6).tolist() == [38, 39, 12, 13]
    assert slot_mapping([NULL_BLOCK, NULL_BLOCK, 5], 2, 2, 6).tolist() == [-1, -1, 10, 11]


@pytest.mark.parametrize("end", [5, 100])
def test_too_few_blocks_are_refused(end: int) -> None:
    with pytest.raises(ValueError, match="1 blocks of 4"):
        slot_mapping([7], 4, 3, end)


# Layers


def test_layer_index() -> None:
    assert layer_index("model.layers.7.self_attn.attn") == 7
    assert layer_index("language_model.model.layers.12.self_attn") == 12
    assert layer_index("transformer.h.3.attn") == 3
    assert layer_index("model.decoder.layers.0.self_attn.attn") == 0
    for name in ("model.embed", "layers", "model.layers.x.attn", "model.layers.1.experts.2.attn"):
        with pytest.raises(UnsupportedModel, match="layer's index"):
            layer_index(name)


def test_a_server_with_other_layers_is_refused(geometry: Geometry) -> None:
    KVLayout({}, {"m.layers.0.a": 0, "m.layers.1.a": 0}, [16]).check(geometry)
    with pytest.raises(UnsupportedModel, match="other layers"):
        KVLayout({}, {"m.layers.0.a": 0, "m.layers.2.a": 0}, [16]).check(geometry)


def rotary_model(theta: float, *, halves: bool = True) -> torch.nn.Module:
    """A model of one attention layer, with vLLM's own rotary embedding."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    model, layer = torch.nn.Module(), torch.nn.Module()
    with set_current_vllm_config(VllmConfig()):
        rope = {"rope_type": "default", "rope_theta": theta}
        layer.rotary_emb = get_rope(64, 256, halves, rope, torch.bfloat16)
    model.h = torch.nn.ModuleList([layer])
    return model


@pytest.mark.parametrize(
    ("theta", "halves", "change"),
    [
        (1e5, True, {}),
        (1e4, False, {}),
        (1e4, True, {"interleaved": True}),
        (1e4, True, {"rotary_dim": 32}),
    ],
    ids=["theta", "pairs", "pairs in the config", "partial"],
)
def test_a_model_that_rotates_otherwise_is_refused(
    theta: float, halves: bool, change: dict[str, Any], geometry: Geometry
) -> None:
    model = rotary_model(theta, halves=halves)
    rope = Positions(scheme="rope", theta=1e4, rotary_dim=64)

    def served(positions: Positions) -> Geometry:
        layer = LayerGeometry(heads=1, head_dim=64, positions=positions)
        return geometry.model_copy(update={"layers": (layer,)})

    check_rotations(rotary_model(1e4), served(rope), ["h.0.attn"])
    check_rotations(model, served(Positions(scheme="none")), ["h.0.attn"])
    check_rotations(torch.nn.Module(), served(rope), ["h.0.attn"])
    with pytest.raises(UnsupportedModel, match=r"h\.0\.attn rotates its keys otherwise"):
        check_rotations(model, served(rope.model_copy(update=change)), ["h.0.attn"])
