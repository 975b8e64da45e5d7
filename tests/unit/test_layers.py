"""The choice of source layers: those without which nothing is lost are left out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from awareness_vllm.fit.layers import Elimination
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.features import state_columns

pytestmark = pytest.mark.unit

RIDGE = 0.05


@pytest.fixture
def source(geometry: Geometry) -> Geometry:
    return geometry.model_copy(update={"layers": geometry.layers * 2})


@pytest.fixture
def statistics(source: Geometry) -> Statistics:
    """Targets that layers 1 and 2 decide; layer 3 is a noisy copy of layer 1, layer 0 is noise."""
    generator = torch.Generator().manual_seed(0)
    embeddings = 3
    x = torch.randn(600, source.width + embeddings, generator=generator)
    first, second, third = (state_columns(source, [i]) for i in (1, 2, 3))
    x[:, third] = x[:, first] + 0.5 * x[:, third]
    informative = torch.cat((x[:, first], x[:, second]), dim=1)
    y = informative @ torch.randn(informative.shape[1], 7, generator=generator)
    statistics = Statistics.start(x, y)
    statistics.add(x, y)
    return statistics


def test_the_informative_layers_are_kept(source: Geometry, statistics: Statistics) -> None:
    elimination = Elimination(statistics, source, torch.ones(7), RIDGE)
    assert elimination.keep(4) == (0, 1, 2, 3)
    assert copy.deepcopy(elimination).keep(2) == (1, 2)
    lost = elimination.cost(0)
    elimination.drop(0)
    lost += elimination.cost(3)
    elimination.drop(3)
    assert lost < elimination.cost(1)


def test_the_cost_is_the_growth_of_the_minimised_error(
    source: Geometry, statistics: Statistics
) -> None:
    weight = torch.linspace(0.5, 2, 7)
    gram, cross = (s.double().numpy() for s in copy.deepcopy(statistics).covariances())
    gram = np.triu(gram) + np.triu(gram, 1).T + RIDGE * np.eye(len(gram))
    cross = cross * weight.numpy()

    def r2_by_part(kept: np.ndarray) -> float:
        part = cross[kept]
        return float(np.sum(part * np.linalg.solve(gram[np.ix_(kept, kept)], part)))

    elimination = Elimination(statistics, source, weight, RIDGE)
    whole = r2_by_part(np.arange(len(gram)))
    lost = 0.0
    for layer in (3, 1):
        lost += elimination.cost(layer)
        elimination.drop(layer)
    gone = torch.cat((state_columns(source, [3]), state_columns(source, [1]))).numpy()
    left = np.setdiff1d(np.arange(len(gram)), gone)
    assert lost == pytest.approx(whole - r2_by_part(left), rel=1e-3)


def test_columns_are_a_layers_keys_and_values(geometry: Geometry) -> None:
    assert state_columns(geometry, [0]).tolist() == [*range(8), *range(16, 24)]
    assert state_columns(geometry, [1]).tolist() == [*range(8, 16), *range(24, 32)]
