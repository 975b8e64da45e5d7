"""Positions off and on again, against transformers' own rotary embedding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.geometry import Positions
from awareness_vllm.positions import apply, strip

pytestmark = pytest.mark.unit


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 3),
    half=st.integers(1, 8),
    rest=st.integers(0, 4),
    theta=st.sampled_from([1e4, 1e5, 1e6]),
    first=st.integers(0, 30_000),
    seed=st.integers(0, 2**31),
)
def test_strip_undoes_apply(
    tokens: int, heads: int, half: int, rest: int, theta: float, first: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, heads, 2 * half + rest, generator=generator)
    positions = torch.arange(first, first + tokens)
    descriptor = Positions(scheme="rope", theta=theta, rotary_dim=2 * half)
    there = apply(keys, positions, descriptor)
    torch.testing.assert_close(strip(there, positions, descriptor), keys, atol=2e-5, rtol=2e-5)
    # What lies beyond the rotated dims is not touched at all.
    assert torch.equal(there[..., 2 * half :], keys[..., 2 * half :])


@pytest.mark.parametrize(("theta", "dim"), [(1e5, 64), (1e4, 256), (1e6, 256)])
def test_apply_is_what_transformers_does(theta: float, dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = LlamaConfig(
        hidden_size=3 * dim,
        num_attention_heads=3,
        head_dim=dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    keys = torch.randn(40, 3, dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7, 47)
    batched = keys.transpose(0, 1)[None]
    cos, sin = LlamaRotaryEmbedding(config)(batched, positions[None])
    expected = apply_rotary_pos_emb(batched, batched, cos, sin)[1][0].transpose(0, 1)
    found = apply(keys, positions, Positions(scheme="rope", theta=theta, rotary_dim=dim))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tables_made_while_serving_can_be_trained_through() -> None:
    descriptor = Positions(scheme="rope", theta=123.0, rotary_dim=4)
    positions = torch.arange(3)
    with torch.inference_mode():
        apply(torch.randn(3, 1, 4), positions, descriptor)
    keys = torch.randn(3, 1, 4, requires_grad=True)
    apply(keys, positions, descriptor).sum().backward()
    assert keys.grad is not None


def test_position_zero_changes_nothing() -> None:
    keys = torch.randn(1, 2, 8)
    descriptor = Positions(scheme="rope", theta=1e4, rotary_dim=8)
    assert torch.equal(apply(keys, torch.zeros(1, dtype=torch.int64), descriptor), keys)


def test_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="alibi"):
        strip(torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64), Positions(scheme="alibi"))
