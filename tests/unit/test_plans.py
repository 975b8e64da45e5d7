"""Which figure a memory of some length is promised, and on what basis."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Plan, Protocol
from awareness_vllm.wmatrix.plans import (
    ASSUMED_TREND,
    basis_of,
    cheapest,
    extrapolated,
    plans_for,
    with_tail,
)

pytestmark = pytest.mark.unit


def interval(mean: float, half: float = 0.05) -> Interval:
    return Interval(mean=mean, ci_low=mean - half, ci_high=mean + half)


def plan(context: int, kept: float, tail: int = 0, reread: int = 0, **more: Any) -> Plan:
    """A plan; of each margin among its figures with the control that it is over."""
    if margin := more.get("margin"):
        more["controls"] = {"quotes": interval(kept - margin.mean)}
    if margin := more.get("facts_margin"):
        more["facts_controls"] = {"quotes": interval(more["facts"].mean - margin.mean)}
    return Plan(
        context=context,
        tail=tail,
        reread=reread,
        cost=0.1 + (tail + reread) / context,
        retention=interval(kept),
        kinds={},
        top1=0.5,
        tokens_only=interval(0.2),
        **more,
    )


def certified(*plans: Plan) -> Certificate:
    ordered = tuple(sorted(plans, key=lambda p: (p.context, p.cost)))
    protocol = Protocol(texts="t", cases="c", limit=8, context=300, continuation=60)
    return Certificate.model_construct(plans=ordered, protocol=protocol, counts={"texts": 8})


FACTS = {"facts": interval(0.8), "facts_margin": interval(0.3), "margin": interval(0.1)}


@pytest.mark.parametrize(
    ("tail", "reread", "kept"),
    [(0, 0, 0.80), (15, 0, 0.80), (16, 0, 0.85), (16, 23, 0.85), (16, 24, 0.9), (99, 99, 0.9)],
)
def test_a_plan_is_looked_up_by_what_is_read_natively(tail: int, reread: int, kept: float) -> None:
    certificate = certified(
        plan(300, 0.80), plan(300, 0.82, 0, 24), plan(300, 0.85, 16), plan(300, 0.9, 16, 24)
    )
    assert with_tail(certificate, 300, tail, reread).retention.mean == kept


@given(context=st.integers(1, 10**6), reread=st.integers(0, 100))
def test_figures_fall_with_length_and_say_when_they_are_extrapolated(
    context: int, reread: int
) -> None:
    certificate = certified(
        *(plan(n, kept, 0, r, **FACTS) for n, kept in ((300, 0.9), (2000, 0.7)) for r in (0, 24))
    )
    now, later = (with_tail(certificate, n, 0, reread) for n in (context, context + 7))
    assert (basis_of(certificate, context) == "extrapolated") == (context > 2000)
    for figure in ("retention", "margin", "facts", "facts_margin"):
        a, b = getattr(now, figure), getattr(later, figure)
        assert b.mean <= a.mean
        assert a.ci_low <= a.mean <= a.ci_high
        if context > 2000:
            assert a.ci_high - a.ci_low > 0.1  # never as sure as what was measured
    assert now.retention.mean >= 0


def test_the_trend_is_that_of_all_lengths() -> None:
    points = [(300, interval(0.9)), (1000, interval(0.6)), (2000, interval(0.7))]
    # By the last two points it would rise.
    found = extrapolated(points, 4000)
    assert found.mean < 0.7
    assert found.ci_low - 0.65 == pytest.approx(2 * (found.mean - 0.7))
    assert found.ci_high == 0.75


def test_a_certificate_of_one_length_falls_by_the_assumed_trend() -> None:
    certificate = certified(plan(300, 0.9))
    (found,) = plans_for(certificate, 2126)
    assert found.retention.mean == pytest.approx(0.9 + ASSUMED_TREND * math.log(2126 / 300))
    assert basis_of(certificate, 2126) == "extrapolated"
    assert extrapolated([(300, interval(-0.5))], 600, least=0.0).mean == -0.5


def test_a_plan_that_its_control_beats_is_never_chosen() -> None:
    beaten, worth = {"margin": interval(0.0)}, {"margin": interval(0.1)}
    certificate = certified(plan(300, 0.93, **beaten), plan(300, 0.95, 16, **worth))
    assert cheapest(certificate, 0.9).tail == 16
    with pytest.raises(QualityUnreachable, match="worth its cost"):
        cheapest(certificate, 0.9, tails=False)
    # As version 0.1 certified: without controls, by retention alone.
    assert cheapest(certified(plan(300, 0.93)), 0.9).margin is None


def test_a_margin_that_ends_with_length_is_no_margin_beyond() -> None:
    certificate = certified(
        plan(300, 0.9, margin=interval(0.2)), plan(2000, 0.9, margin=interval(0.02))
    )
    assert cheapest(certificate, 0.8, 2000).context == 2000
    with pytest.raises(QualityUnreachable, match="worth its cost"):
        cheapest(certificate, 0.8, 8000)


def test_plans_that_reread_are_for_requests_that_do() -> None:
    certificate = certified(plan(300, 0.8), plan(300, 0.9, 0, 24))
    assert cheapest(certificate, 0.85, reread=24).reread == 24
    with pytest.raises(QualityUnreachable, match=r"0\.800"):
        cheapest(certificate, 0.85)
