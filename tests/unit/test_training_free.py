"""Training-free mappings: correspondences of heads and layers, and the warning of their users."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from awareness_vllm.aligners import training_free as strategies
from awareness_vllm.aligners.training_free import (
    MERGES,
    SPLITS,
    Configuration,
    Figure,
    TrainingFree,
    TrainingFreeWarning,
    resized,
    training_free,
    turns,
    uniform,
    warn,
)
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions, by_depth
from awareness_vllm.wmatrix.certificate import Interval

pytestmark = pytest.mark.unit


def layer(heads: int, dim: int = 4) -> LayerGeometry:
    positions = Positions(scheme="rope", theta=1e4, rotary_dim=dim)
    return LayerGeometry(heads=heads, head_dim=dim, positions=positions)


def model(geometry: Geometry, *shapes: tuple[int, int]) -> Geometry:
    return geometry.model_copy(update={"layers": tuple(layer(*shape) for shape in shapes)})


@pytest.mark.parametrize(
    ("source", "target", "grouped", "shares"),
    [
        (4, 2, True, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (4, 2, False, [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]),
        (2, 4, True, [[1, 0], [1, 0], [0, 1], [0, 1]]),
        (2, 4, False, [[1, 0], [0, 1], [1, 0], [0, 1]]),
        (3, 2, True, [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]),
        (3, 3, True, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_heads_correspond_by_place(
    source: int, target: int, grouped: bool, shares: list[list[float]]
) -> None:
    result = uniform(layer(source), layer(target), grouped)
    torch.testing.assert_close(result, torch.tensor(shares).float())


@pytest.mark.parametrize(
    ("source", "target", "result"),
    [(30, 3, [0, 14, 29]), (2, 5, [0, 0, 0, 1, 1]), (4, 4, [0, 1, 2, 3]), (6, 1, [0])],
)
def test_layers_correspond_by_depth(source: int, target: int, result: list[int]) -> None:
    assert by_depth(source, target) == result


def test_merging_by_weight_follows_the_keys_norms() -> None:
    shares = torch.tensor([[0.5, 0.5]])
    keys = torch.stack((torch.full((1, 4), 3.0), torch.full((1, 4), 1.0)), 1)
    keys = torch.cat((keys, torch.zeros(1, 2, 4)))
    torch.testing.assert_close(MERGES["mean"](shares, keys), shares[None])
    result = MERGES["weighted"](shares, keys)
    torch.testing.assert_close(result[0], torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(result[1], shares)  # heads that say nothing count alike


def test_split_heads_are_copies_or_rotated_apart() -> None:
    turn = turns(uniform(layer(1), layer(3), True))
    assert turn.tolist() == [0, 1, 2]
    assert turns(uniform(layer(2), layer(4), False)).tolist() == [0, 0, 1, 1]
    states = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1)
    assert torch.equal(SPLITS["repeat"](states, turn), states)
    result = SPLITS["projection"](states, turn)
    torch.testing.assert_close(result[:, 0], states[:, 0])
    for head in (1, 2):
        torch.testing.assert_close(
            result[:, head] @ result[:, head].T, states[:, 0] @ states[:, 0].T, atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(result[:, head], result[:, head - 1])


def test_dims_are_cut_off_or_padded() -> None:
    states = torch.arange(6.0).view(1, 2, 3)
    assert resized(states, 2).tolist() == [[[0, 1], [3, 4]]]
    assert resized(states, 4).tolist() == [[[0, 1, 2, 0], [3, 4, 5, 0]]]


def made(source: Geometry, target: Geometry, configuration: Configuration) -> TrainingFree:
    sink = [torch.zeros(1, g.heads, g.head_dim) for g in target.layers]
    return training_free(source, target, configuration, [2], (sink, sink))


def test_states_go_to_their_layers_and_heads(geometry: Geometry) -> None:
    source = model(geometry, (2, 4), (4, 4), (2, 4), (4, 4))
    target = model(geometry, (2, 4), (2, 4))
    mapped = made(source, target, Configuration("uniform", "mean", "repeat"))
    assert mapped.manifest.layers == (0, 3)
    states = torch.randn(3, source.width_of((0, 3)), generator=torch.Generator().manual_seed(1))
    keys, values = mapped.map(states, torch.empty(3, 0), torch.tensor([False, True, False]))
    keep = torch.tensor([1.0, 0, 1])[:, None]

    def own(begin: int, heads: int) -> Tensor:
        return (states[:, begin : begin + 4 * heads] * keep).view(3, heads, 4)

    # Keys of layers 0 and 3 are 8 and 16 wide, then their values.
    torch.testing.assert_close(keys[0], own(0, 2))
    torch.testing.assert_close(keys[1], own(8, 4).view(3, 2, 2, 4).mean(2))
    torch.testing.assert_close(values[0], own(24, 2))
    torch.testing.assert_close(values[1], own(32, 4).view(3, 2, 2, 4).mean(2))
    assert not any(s.any() for part in mapped.map(None, torch.empty(3, 0)) for s in part)


def test_the_summary_names_heads(geometry: Geometry) -> None:
    mapped = made(model(geometry, (2, 4)), model(geometry, (1, 4)), Configuration("uniform"))
    rows = mapped.head_mapping()
    assert [str(row.target) for row in rows] == ["layer 0 head 0 key", "layer 0 head 0 value"]
    assert [(str(head), share) for head, share in rows[1].shares] == [
        ("layer 0 head 0 value", 0.5),
        ("layer 0 head 1 value", 0.5),
    ]


@pytest.mark.parametrize(("shape", "field"), [((1, 4), "heads"), ((2, 8), "head_dim")])
def test_identity_needs_the_same_heads(
    geometry: Geometry, shape: tuple[int, int], field: str
) -> None:
    with pytest.raises(UnsupportedModel, match=rf"{field}={shape[field == 'head_dim']} in the ta"):
        made(model(geometry, (2, 4)), model(geometry, shape), Configuration("identity"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_mapping": "random"}, "learned, uniform, identity"),
        ({"head_mapping": "uniform", "merge_strategy": "max"}, "mean, weighted"),
        ({"head_mapping": "uniform", "split_strategy": "x"}, "repeat, projection"),
        ({"merge_strategy": "mean"}, "as it was fitted"),
        ({"preserve_group_query": False}, "as it was fitted"),
    ],
)
def test_unknown_strategies_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Configuration(**changes)


def test_it_has_no_file(geometry: Geometry, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="awareness fit"):
        made(geometry, geometry, Configuration("identity")).save(tmp_path / "x.wmatrix")


def test_a_warning_has_the_measured_figures(
    geometry: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = geometry.model_copy(update={"name": "other", "weights": "o" * 64})
    configuration = Configuration("uniform")
    monkeypatch.setattr(strategies, "FIGURES", tmp_path / "figures.json")

    def record(*result: Figure) -> None:
        strategies.FIGURES.write_text(json.dumps([f.model_dump(mode="json") for f in result]))

    figure = Figure(
        source="tiny",
        target="other",
        weights=(geometry.weights, other.weights),
        configuration=asdict(configuration),
        retention=Interval(mean=-0.25, ci_low=-0.5, ci_high=0.1),
        conditions={},
        context=300,
        n=12,
        texts="",
        measured="2026-11-23",
        hardware="",
        versions={},
    )
    record()
    with pytest.warns(TrainingFreeWarning, match="never measured"):
        warn(configuration, geometry, other)
    record(figure)
    with pytest.warns(TrainingFreeWarning, match=r"tiny → other: retention -0\.250 \(-0\.500"):
        warn(configuration, geometry, other)
    with pytest.warns(TrainingFreeWarning, match="between these models; elsewhere: retention -0.2"):
        warn(configuration, other, geometry)
    with pytest.warns(TrainingFreeWarning, match="never measured"):
        warn(Configuration("uniform", "mean"), geometry, other)


def test_the_recorded_figures_can_be_read() -> None:
    strategies.figures()
