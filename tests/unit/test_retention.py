"""Retention: its exact value, and an interval that contains it."""

from __future__ import annotations

import numpy as np
import pytest

from awareness_vllm.wmatrix.evaluate import retention

pytestmark = pytest.mark.unit

NATIVE = np.array([2.0, 3.0, 2.5, 1.0, 2.0, 3.5])
NONE = NATIVE + np.array([1.0, 2.0, 0.5, 3.0, 1.5, 1.0])
GAINED = np.array([0.9, 1.5, 0.5, 2.4, 0.6, 0.8])


def test_the_exact_value() -> None:
    # 6.7 of 9.0 nats, not the mean of the documents' own shares.
    assert retention(NATIVE, NONE - GAINED, NONE)["mean"] == pytest.approx(6.7 / 9.0)


def test_the_interval_contains_the_mean_and_has_width() -> None:
    found = retention(NATIVE, NONE - GAINED, NONE)
    assert found["ci_low"] < found["mean"] < found["ci_high"]
    assert found["ci_high"] - found["ci_low"] < 0.5


def test_native_is_one_and_none_is_zero_without_doubt() -> None:
    assert set(retention(NATIVE, NATIVE, NONE).values()) == {1.0}
    assert set(retention(NATIVE, NONE, NONE).values()) == {0.0}


def test_better_memories_retain_more_and_harmful_ones_less_than_nothing() -> None:
    means = [retention(NATIVE, NONE - share * GAINED, NONE)["mean"] for share in (-1, 0.5, 1, 2)]
    assert means == sorted(means)
    assert means[0] < 0 < means[1]


def test_the_same_figures_give_the_same_interval() -> None:
    memory = NONE - GAINED
    assert retention(NATIVE, memory, NONE) == retention(NATIVE, memory, NONE)


def test_the_order_of_documents_does_not_change_the_mean() -> None:
    order = np.array([3, 1, 5, 0, 2, 4])
    one = retention(NATIVE, NONE - GAINED, NONE)
    other = retention(NATIVE[order], (NONE - GAINED)[order], NONE[order])
    assert other["mean"] == pytest.approx(one["mean"])
    # Documents are drawn whole: the interval is one over them, whatever their order.
    assert other["ci_low"] == pytest.approx(one["ci_low"], abs=0.03)
    assert other["ci_high"] == pytest.approx(one["ci_high"], abs=0.03)
