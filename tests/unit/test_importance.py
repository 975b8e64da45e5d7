"""The weights of the regression: states that no prediction depends on weigh nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from awareness_vllm.fit.importance import SHRINKAGE, importance, output_weight
from awareness_vllm.fit.reader import Reader

pytestmark = pytest.mark.unit

PAIRS = [("the quick brown fox jumps", " over the lazy dog"), ("one two three", " four five")]


def test_states_that_nothing_reads_are_unimportant(tiny_models: tuple[Path, Path]) -> None:
    reader = Reader(*tiny_models, predecessors=0)
    layers = reader.target_model.model.layers
    torch.nn.init.zeros_(layers[1].self_attn.o_proj.weight)
    result = importance(reader, PAIRS)
    widths = [layer.width for layer in reader.target_geometry.layers] * 2
    keys_0, keys_1, values_0, values_1 = result.split(widths)
    assert not keys_1.any()
    assert not values_1.any()
    assert (keys_0 > 0).all()
    assert (values_0 > 0).all()
    assert torch.equal(result, importance(reader, PAIRS))


def test_weights_are_of_standardised_targets() -> None:
    information, spread = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 2.0, 5.0, 0.5])
    squares = output_weight(information, spread, [2, 2]).square()
    standardised = information * spread.square()
    floor = SHRINKAGE * torch.tensor([4.0, 4.0, 1.125, 1.125])
    torch.testing.assert_close(squares, standardised + floor)
