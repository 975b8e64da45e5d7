"""Positions taken off keys and put on, against the rotary embeddings of vLLM and transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.describe import from_config
from awareness_vllm.models.geometry import Positions
from awareness_vllm.models.rope import SCHEMES, cos_sin_table, rerotate, rotate, unrotate

pytestmark = pytest.mark.unit

DIM, TRAINED, LENGTH = 64, 512, 2048
PAIRS = DIM // 2
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2 * DIM,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "max_position_embeddings": LENGTH,
}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(PAIRS)],
    "long_factor": [1.0 + 0.5 * i for i in range(PAIRS)],
    "original_max_position_embeddings": TRAINED,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **STRETCHED},
    "yarn": {"rope_type": "yarn", **STRETCHED},
    "yarn, mscales": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5, **STRETCHED},
    "yarn, attention": {"rope_type": "yarn", "attention_factor": 0.8, **STRETCHED},
    "yarn, ramp": {
        "rope_type": "yarn", "truncate": False, "beta_fast": 16, "beta_slow": 2, **STRETCHED
    },
    "longrope": LONG,
}  # fmt: skip


def config_of(rope: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(LLAMA | {"rope_parameters": {"rope_theta": 10000.0} | rope})


def descriptor_of(rope: dict[str, Any], tokens: int | None = None) -> Positions:
    geometry = from_config(config_of(rope), name="m", weights="", tokenizer="", tokens=tokens)
    return geometry.layers[0].positions


@pytest.fixture(scope="module")
def vllm() -> Iterator[None]:
    """What vLLM's modules ask of the engine around them: nothing but a config."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def vllm_rope(rope: dict[str, Any], *, halves: bool = True) -> Any:
    from transformers import LlamaConfig
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = LlamaConfig(**config_of(rope)).rope_parameters  # as its models pass them on
    return get_rope(DIM, LENGTH, halves, parameters, torch.float32)


@pytest.mark.parametrize("name", [name for name in ROPES if name != "longrope"])
def test_tables_are_vllms_bit_for_bit(vllm: None, name: str) -> None:
    expected = vllm_rope(ROPES[name])._compute_cos_sin_cache()[:LENGTH]
    result = cos_sin_table(torch.arange(LENGTH), descriptor_of(ROPES[name]))
    assert torch.equal(torch.cat(result, dim=-1), expected)


@pytest.mark.parametrize("tokens", [TRAINED, TRAINED + 1], ids=["short", "long"])
def test_longrope_is_vllms_of_a_servers_length(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as module

    served = SimpleNamespace(model_config=SimpleNamespace(max_model_len=tokens))
    monkeypatch.setattr(module, "get_current_vllm_config", lambda: served)
    rope = module.Phi3LongRoPEScaledRotaryEmbedding(
        DIM, DIM, LENGTH, TRAINED, 10000.0, True, torch.float32,
        LONG["short_factor"], LONG["long_factor"],
    )  # fmt: skip
    begin = TRAINED if rope.use_long_rope else 0
    expected = rope.long_short_cos_sin_cache[begin : begin + TRAINED]
    result = cos_sin_table(torch.arange(TRAINED), descriptor_of(LONG, tokens))
    assert torch.equal(torch.cat(result, dim=-1), expected)


@pytest.mark.parametrize("tokens", [TRAINED, LENGTH], ids=["short", "long"])
@pytest.mark.parametrize("name", list(ROPES))
def test_tables_are_transformers_own(name: str, tokens: int) -> None:
    """Bit for bit, but for linear scaling: there the frequencies are divided, not the positions, so
    that either is rounded three times and an angle differs by up to four units in its last place.
    """
    from transformers import LlamaConfig, PhiConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    partial = "partial_rotary_factor" in ROPES[name]
    kind, module = (
        (PhiConfig, PhiRotaryEmbedding) if partial else (LlamaConfig, LlamaRotaryEmbedding)
    )
    positions = torch.arange(tokens)
    rotary = module(kind(**config_of(ROPES[name])))
    expected = rotary(torch.empty(1), positions[None])
    for result, doubled in zip(
        cos_sin_table(positions, descriptor_of(ROPES[name], tokens)), expected, strict=True
    ):
        close = 4 * tokens * torch.finfo(torch.float32).eps if name == "linear" else 0
        torch.testing.assert_close(result, doubled[0, :, : result.shape[1]], atol=close, rtol=0)


def test_a_dynamic_table_is_that_of_its_length() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**config_of(ROPES["dynamic"]))
    longer = descriptor_of(ROPES["dynamic"]).model_copy(update={"length": 3 * LENGTH})
    inverse, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=3 * LENGTH)
    angles = torch.arange(3 * LENGTH).float()[:, None] * inverse
    assert torch.equal(cos_sin_table(torch.arange(3 * LENGTH), longer)[0], angles.cos())


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("name", ["default", "partial", "yarn"])
def test_keys_are_rotated_as_by_vllm(vllm: None, name: str, interleaved: bool) -> None:
    keys, positions = random_keys(40), torch.arange(1000, 1040)
    rope = vllm_rope(ROPES[name], halves=not interleaved)
    expected = rope.forward_native(positions, keys.flatten(1).clone(), keys.flatten(1).clone())[1]
    descriptor = descriptor_of(ROPES[name]).model_copy(update={"interleaved": interleaved})
    assert torch.equal(rotate(keys, positions, descriptor).flatten(1), expected)


def random_keys(tokens: int, heads: int = 2, dim: int = DIM, seed: int = 0) -> Tensor:
    return torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(seed))


@st.composite
def descriptors(draw: st.DrawFn) -> Positions:
    """Any scheme with any parameters that it may have, over at most DIM dims."""
    name = draw(st.sampled_from(sorted(SCHEMES)))
    if name in ("none", "alibi", "learned"):
        return Positions(scheme=name)
    pairs = draw(st.integers(2, PAIRS))
    slow = draw(st.floats(0.5, 4))
    return Positions(
        scheme=name,
        theta=draw(st.sampled_from([1e4, 1e5, 1e6])),
        rotary_dim=2 * pairs,
        interleaved=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.7, 1.2])) if name in ("yarn", "longrope") else None,
        factor=draw(st.floats(1, 16)),
        original=draw(st.sampled_from([64, 4096])),
        length=8192,
        beta_slow=slow,
        beta_fast=slow + draw(st.floats(1, 30)),
        truncate=draw(st.booleans()),
        factors=tuple(draw(st.lists(st.floats(1, 60), min_size=pairs, max_size=pairs))),
    )


@given(descriptors(), st.integers(1, 20), st.integers(0, 30_000), st.integers(0, 2**31))
def test_unrotate_undoes_rotate(descriptor: Positions, tokens: int, first: int, seed: int) -> None:
    keys, positions = random_keys(tokens, seed=seed), torch.arange(first, first + tokens)
    there = rotate(keys, positions, descriptor)
    # Two turns of four products each, and a division.
    close = 16 * torch.finfo(torch.float32).eps * keys.abs().max().item()
    torch.testing.assert_close(unrotate(there, positions, descriptor), keys, atol=close, rtol=0)
    # What lies beyond the rotated dims is not touched at all.
    rotated = descriptor.rotary_dim or 0
    assert torch.equal(there[..., rotated:], keys[..., rotated:])


@given(descriptors(), st.integers(1, 20), st.integers(0, 4000), st.integers(-4000, 4000))
def test_rerotate_is_rotate_at_other_positions(
    descriptor: Positions, tokens: int, first: int, offset: int
) -> None:
    if descriptor.additive or first + offset < 0:
        return
    keys, positions = random_keys(tokens), torch.arange(first, first + tokens)
    moved = rerotate(rotate(keys, positions, descriptor), offset, descriptor)
    expected = rotate(keys, positions + offset, descriptor)
    # Angles in radians are as large as positions, and each of three is rounded twice.
    close = 6 * 8020 * torch.finfo(torch.float32).eps * keys.abs().max().item()
    torch.testing.assert_close(moved, expected, atol=close, rtol=0)


@pytest.mark.parametrize("scheme", ["none", "alibi", "learned"])
def test_keys_without_positions_stay_as_they_are(scheme: str) -> None:
    keys, positions = random_keys(5), torch.arange(90, 95)
    for change in (rotate, unrotate):
        assert torch.equal(change(keys, positions, Positions(scheme=scheme)), keys)


def test_states_with_learned_positions_are_not_moved() -> None:
    learned = Positions(scheme="learned")
    assert learned.additive
    assert torch.equal(rerotate(random_keys(3), 0, learned), random_keys(3))
    with pytest.raises(UnsupportedModel, match="an offset of 7"):
        rerotate(random_keys(3), 7, learned)


def test_tables_made_while_serving_can_be_trained_through() -> None:
    descriptor = Positions(scheme="rope", theta=123.0, rotary_dim=4)
    positions = torch.arange(3)
    with torch.inference_mode():
        rotate(torch.randn(3, 1, 4), positions, descriptor)
    keys = torch.randn(3, 1, 4, requires_grad=True)
    rotate(keys, positions, descriptor).sum().backward()
    assert keys.grad is not None


def test_position_zero_changes_nothing() -> None:
    keys = torch.randn(1, 2, 8)
    descriptor = Positions(scheme="rope", theta=1e4, rotary_dim=8)
    assert torch.equal(rotate(keys, torch.zeros(1, dtype=torch.int64), descriptor), keys)


@pytest.mark.parametrize(
    ("descriptor", "named"),
    [
        (Positions(scheme="spiral"), "spiral"),
        (Positions(scheme="rope", theta=1e4), "rotary_dim"),
        (Positions(scheme="yarn", theta=1e4, rotary_dim=8, factor=2, slow=1, fast=2), "original"),
        (Positions(scheme="longrope", theta=1e4, rotary_dim=8, factors=(1.0,) * 3), "3 factors"),
    ],
)
def test_incomplete_positions_are_refused_by_name(descriptor: Positions, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        unrotate(torch.zeros(1, 1, 8), torch.zeros(1, dtype=torch.int64), descriptor)


def test_manifests_of_plain_rotary_positions_are_what_they_were() -> None:
    plain = Positions(scheme="rope", theta=1e4, rotary_dim=64)
    assert plain.model_dump_json() == '{"scheme":"rope","theta":10000.0,"rotary_dim":64}'
    assert Positions.model_validate_json(plain.model_dump_json()) == plain
    long = descriptor_of(LONG)
    assert Positions.model_validate_json(long.model_dump_json()) == long
