"""Reports: what the same cost buys without a memory, and lengths that nobody measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_memory_checker import Models, certify, described, memory, no_calibration, plain

from awareness_vllm.packages.file import Package

pytestmark = pytest.mark.unit
__all__ = ["certify", "memory", "no_calibration", "plain"]


@pytest.mark.parametrize(
    ("margin", "said"),
    [
        (0.2, ""),
        (
            -0.1,
            "high: reading a part of the text for the same cost (truncation) keeps as much or more",
        ),
        (None, "medium: what the same cost buys without a memory was not measured"),
    ],
)
def test_a_memory_that_its_control_beats_is_a_risk(
    certify: Any, tiny_models: Models, memory: Package, margin: float | None, said: str
) -> None:
    report = certify(margin=margin).check(package=memory, target_model=tiny_models[1])
    assert said in described(report)
    assert ("same cost" in described(report)) == bool(said)
    assert (report.margin and report.margin.mean) == margin
    assert set(report.controls) == ({"truncation", "quotes"} if margin else set())
    # A tail of which the control keeps as much is no advice.
    natively = [a for a in report.actions if "--tail" in a.description]
    assert not natively or margin != -0.1


def test_beyond_the_measured_lengths_a_figure_is_extrapolated(
    certify: Any, tiny_models: Models
) -> None:
    listing = SimpleNamespace(source_model="source", token_count=1000)
    checker = certify(margin=0.2)
    measured = checker.check(listing, tiny_models[1].name)
    listing.token_count = 4000
    beyond = checker.check(listing, tiny_models[1].name)
    assert (measured.basis.kind, beyond.basis.kind) == ("measured", "extrapolated")
    assert beyond.estimated_retention < measured.estimated_retention
    assert beyond.margin.mean == measured.margin.mean  # as at both measured lengths
    assert beyond.margin.ci_low < measured.margin.ci_low
    assert beyond.ci_high <= 1.02


def test_longer_than_measured_and_few_texts_are_risks(
    certify: Any, tiny_models: Models, memory: Package
) -> None:
    listing = SimpleNamespace(source_model="source", token_count=1500)
    found = certify(texts=8).check(listing, tiny_models[1].name)
    assert "medium: 1500 tokens: the longest" in described(found)
    assert "from 8 texts" in described(found)
    listing.token_count = 5000
    assert "high: 5000 tokens" in described(certify().check(listing, tiny_models[1].name))
    assert "the longest" not in described(
        certify().check(package=memory, target_model=tiny_models[1])
    )
