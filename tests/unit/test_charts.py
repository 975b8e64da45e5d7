"""Coordinates of the page's drawings."""

from __future__ import annotations

import numpy as np
import pytest
import samples

from awareness_vllm.compatibility.html.charts import base_of, heat_map, runs, signed
from awareness_vllm.compatibility.report import Share
from awareness_vllm.wmatrix.certificate import Interval

pytestmark = pytest.mark.unit


def test_neighbours_of_the_heat_map_are_one_path() -> None:
    cells = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    assert runs(cells) == "M0 0h2v1h-2zM3 0h1v1h-1zM0 2h4v1h-4z"


def test_more_heads_than_can_be_seen_are_drawn_by_layer() -> None:
    few, many = samples.heads(layers=4), samples.heads(layers=80, each=8)
    assert heat_map(few).columns[0][1] == "K0.0"
    assert heat_map(many).columns[0][1] == "K0"
    assert sum(map(len, heat_map(many).shades)) < 100_000


@pytest.mark.parametrize(
    ("low", "base"), [(0.91, 0.7), (0.62, 0.6), (0.05, 0.0), (-0.3, 0.0), (1.0, 0.7)]
)
def test_a_scale_has_room_for_its_interval(low: float, base: float) -> None:
    assert base_of(Interval(mean=low, ci_low=low, ci_high=low)) == pytest.approx(base)


def test_shares_of_nothing_have_bars_without_width() -> None:
    (bar,) = signed([Share(source="a", share=samples.interval(0.0), prior=None)])
    assert [(left, width) for left, width, _ in bar] == [(0, 0)] * 3
