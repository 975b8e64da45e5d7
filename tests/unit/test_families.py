"""Every family's geometry, and its own states put back into it: with transformers, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SAID, VOCABULARY, build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from awareness_vllm.models.describe import from_config
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.hf import cache_repeats, states
from awareness_vllm.models.rope import rerotate, rotate, unrotate

pytestmark = [pytest.mark.unit, pytest.mark.slow]

TOKENS, OFFSET = 48, 77
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return build(family)


@pytest.fixture(scope="module")
def geometry(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Geometry:
    folder: Path = tmp_path_factory.mktemp("family")
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return from_config(config, name="tiny", weights="w", tokenizer="t")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (TOKENS,), generator=generator).tolist()


@torch.no_grad()
def continued(
    model: PreTrainedModel, keys: list[Tensor], values: list[Tensor], last: int, offset: int = 0
) -> tuple[list[int], Tensor]:
    """SAID greedy tokens after states and one more token, and the first one's logits."""
    cache = DynamicCache()
    for i, layer in enumerate(zip(keys, values, strict=True)):
        cached = (state.repeat_interleave(cache_repeats(model.config), dim=1) for state in layer)
        cache.update(*(state.transpose(0, 1)[None] for state in cached), i)
    tokens, first = [last], torch.empty(0)
    for step in range(SAID):
        at = {"position_ids": torch.tensor([[offset + len(keys[0]) + step]])} if offset else {}
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, **at).logits[0, -1]
        first = first if step else logits
        tokens.append(int(logits.argmax()))
    return tokens[1:], first


@torch.no_grad()
def native(model: PreTrainedModel, ids: list[int]) -> tuple[list[int], Tensor]:
    """The same after the text, as it is read at once into the model's own cache."""
    cache = DynamicCache()
    model(torch.tensor([ids[:-1]]), past_key_values=cache)
    tokens, first = [ids[-1]], torch.empty(0)
    for step in range(SAID):
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1]
        first = first if step else logits
        tokens.append(int(logits.argmax()))
    return tokens[1:], first


def test_states_have_the_geometrys_shapes(
    model: PreTrainedModel, geometry: Geometry, ids: list[int]
) -> None:
    keys, values = states(model, ids)
    shapes = [(TOKENS, layer.heads, layer.head_dim) for layer in geometry.layers]
    assert [tuple(key.shape) for key in keys] == shapes
    assert [tuple(value.shape) for value in values] == shapes


def test_vllm_reads_the_same_heads(model: PreTrainedModel, geometry: Geometry) -> None:
    import vllm.config  # first: the two modules import each other
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    assert vllm.config
    kind = MODEL_ARCH_CONFIG_CONVERTORS.get(geometry.model_type, ModelArchConfigConvertorBase)
    served = kind(model.config, model.config.get_text_config())
    assert len(geometry.layers) == served.get_num_hidden_layers()
    assert {(layer.heads, layer.head_dim) for layer in geometry.layers} == {
        (served.get_total_num_kv_heads(), served.get_head_size())
    }


def test_a_models_own_states_are_as_good_as_its_text(
    model: PreTrainedModel, ids: list[int]
) -> None:
    tokens, logits = native(model, ids)
    again, result = continued(model, *states(model, ids[:-1]), ids[-1])
    assert torch.equal(result, logits)
    assert again == tokens
    assert len(set(tokens)) > 4, "too dull a model to tell anything"


def test_keys_without_and_with_positions_again(
    model: PreTrainedModel, geometry: Geometry, ids: list[int]
) -> None:
    keys, values = states(model, ids[:-1])
    at = torch.arange(len(keys[0]))
    free, again = [], []
    for key, layer in zip(keys, geometry.layers, strict=True):
        free.append(unrotate(key, at, layer.positions))
        again.append(rotate(free[-1], at, layer.positions))
    expected = continued(model, keys, values, ids[-1])[1]
    result = continued(model, again, values, ids[-1])[1]
    close = 200 * EPSILON * expected.abs().max().item()
    torch.testing.assert_close(result, expected, atol=close, rtol=0)
    # A model whose keys hold positions says something else without them.
    rotated = any(layer.positions.rotary_dim for layer in geometry.layers)
    assert rotated != torch.equal(continued(model, free, values, ids[-1])[1], expected)


@torch.no_grad()
def test_states_moved_are_states_read_elsewhere(
    model: PreTrainedModel, geometry: Geometry, ids: list[int]
) -> None:
    if geometry.additive:
        return  # refused: test_positions
    keys, values = states(model, ids[:-1])
    moved = [rerotate(k, OFFSET, g.positions) for k, g in zip(keys, geometry.layers, strict=True)]
    if not any(layer.positions.rotary_dim for layer in geometry.layers):
        assert all(torch.equal(*pair) for pair in zip(moved, keys, strict=True))
        return  # ALiBi: there is no way to say where a text stands
    cache = DynamicCache()
    at = OFFSET + torch.arange(len(keys[0]))
    model(torch.tensor([ids[:-1]]), position_ids=at[None], past_key_values=cache)
    expected = model(
        torch.tensor([ids[-1:]]), position_ids=at[None, -1:] + 1, past_key_values=cache
    ).logits[0, -1]
    result = continued(model, moved, values, ids[-1], OFFSET)[1]
    # Angles are as large as positions, and what rounds them passes through two layers.
    close = 20 * (OFFSET + TOKENS) * EPSILON * expected.abs().max().item()
    torch.testing.assert_close(result, expected, atol=close, rtol=0)
