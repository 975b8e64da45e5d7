"""Figures as text: a prior is marked, an interval without width left out."""

from __future__ import annotations

import pytest
import samples

from awareness_vllm.compatibility.html.figures import condition, figure, percent, spread

pytestmark = pytest.mark.unit


def test_figures_and_arms_read_well() -> None:
    assert (percent(0.894), percent(0.91, prior=True)) == ("89.4 %", "~91 %")
    assert (spread(0.5, 0.625), spread(0.5, 0.5), spread(None, 1)) == ("50.0 … 62.5", "", "")
    assert condition("memory_tail_48") == "memory, last 48 tokens read natively"
    both = "memory, last 48 tokens read natively, up to 24 re-read in place"
    assert condition("memory_tail_48_reread_24") == both
    assert condition("memory_reread_24") == "memory, up to 24 re-read in place"
    assert condition("another") == "another"


def test_a_prior_and_its_interval_in_one_line() -> None:
    interval = samples.interval(0.9, 0.02)
    assert figure(interval, samples.MEASURED) == "90.0 % (88.0 … 92.0)"
    assert figure(interval, samples.PRIOR) == "~90 % (88.0 … 92.0)"
    assert figure(samples.interval(0.9), samples.PRIOR) == "~90 %"
