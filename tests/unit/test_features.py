"""The reference mathematics of the features: exact, and each its own inverse where it has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.kernels import decode, encode, rms_normalise, with_predecessors
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rotate
from awareness_vllm.wmatrix.features import (
    embedding_features,
    flat_states,
    masked_rows,
    split_states,
)

pytestmark = pytest.mark.unit


def random_states(geometry: Geometry, tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, g.heads, g.head_dim, generator=generator) for g in geometry.layers]


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_split_states_inverts_flat_states(geometry: Geometry, tokens: int) -> None:
    free, values = random_states(geometry, tokens, 0), random_states(geometry, tokens, 1)
    positions = torch.arange(tokens)
    cached = [rotate(k, positions, g.positions) for k, g in zip(free, geometry.layers, strict=True)]
    flat = flat_states(geometry, cached, values)
    assert flat.shape == (tokens, geometry.width)
    keys_found, values_found = split_states(geometry, flat)
    for one, other in zip(free, keys_found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    for one, other in zip(values, values_found, strict=True):
        assert torch.equal(one, other)


def test_keys_come_before_values(geometry: Geometry) -> None:
    keys, values = random_states(geometry, 1, 0), random_states(geometry, 1, 1)
    flat = flat_states(geometry, keys, values)
    # Position 0 turns nothing.
    assert torch.equal(flat[:, : geometry.key_width], torch.cat([k.flatten(1) for k in keys], 1))


def test_only_some_layers_are_read(geometry: Geometry) -> None:
    keys, values = random_states(geometry, 5, 0), random_states(geometry, 5, 1)
    whole_keys, whole_values = split_states(geometry, flat_states(geometry, keys, values))
    flat = flat_states(geometry, keys, values, layers=(1,))
    assert flat.shape == (5, geometry.width_of((1,)))
    assert torch.equal(flat, torch.cat([whole_keys[1].flatten(1), whole_values[1].flatten(1)], 1))


def test_flat_states_are_float32(geometry: Geometry) -> None:
    states = [s.bfloat16() for s in random_states(geometry, 3, 0)]
    assert flat_states(geometry, states, states).dtype == torch.float32


@given(tokens=st.integers(0, 6), count=st.integers(0, 8))
def test_predecessors_stand_beside_each_row(tokens: int, count: int) -> None:
    x = torch.arange(1.0, 1 + 2 * tokens).view(tokens, 2)
    result = with_predecessors(x, count)
    assert result.shape == (tokens, 2 * (1 + count))
    for t in range(tokens):
        for back in range(count + 1):
            expected = x[t - back] if t >= back else torch.zeros(2)
            assert torch.equal(result[t, 2 * back : 2 * back + 2], expected)


def test_rms_normalise() -> None:
    x = torch.tensor([[3.0, 4.0], [-30.0, 40.0], [0.0, 0.0]]).bfloat16()
    result = rms_normalise(x)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[:2].square().mean(-1), torch.ones(2))
    torch.testing.assert_close(result[0, 1] / result[0, 0], torch.tensor(4 / 3))
    assert not result[2].any()


def test_encode_and_decode_are_an_affine_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x, down, up, bias = (
        torch.randn(*shape, generator=generator) for shape in ((5, 7), (7, 3), (3, 4), (4,))
    )
    result = decode(encode(x, down), up, bias)
    torch.testing.assert_close(result, x @ down @ up + bias)
    half = decode(encode(x, down.bfloat16()), up.bfloat16(), bias)
    assert half.dtype == torch.float32


def test_rows_at_the_first_source_position_are_masked() -> None:
    assert masked_rows(np.array([0, 0, 1, 5, 0])).tolist() == [True, True, False, False, True]


def test_embedding_features_see_the_sink_but_leave_it_out() -> None:
    table = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    result = embedding_features(lambda ids: table[ids], [2, 0, 1], sink=1, predecessors=2)
    rows = rms_normalise(table)
    assert torch.equal(result[0], torch.cat((rows[0], rows[2], torch.zeros(2))))
    assert torch.equal(result[1], torch.cat((rows[1], rows[0], rows[2])))
    assert len(result) == 2
