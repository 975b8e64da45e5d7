"""The plans of a certificate for a memory of some length, measured there or extrapolated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Plan

PlanBasis = Literal["measured", "extrapolated"]
"""Whether memories at least as long, with such states, were measured; or only ones like them."""
ASSUMED_TREND = -0.06
"""What a figure gains for each factor of e in length where only one length was measured: the maps
that were measured at several lost about so much of their retention (docs/results.md)."""


def longest_context(certificate: Certificate) -> int:
    """The tokens of the longest contexts that were measured."""
    return max(plan.context for plan in certificate.plans)


def basis_of(certificate: Certificate, context: int, *, rounded: bool = False) -> PlanBasis:
    """The basis of the figures for a memory of `context` tokens.

    Args:
        rounded: whether its states come of a latent in int8, or go into a cache in fp8: the
            certificate is of states that were not rounded.
    """
    within = context <= longest_context(certificate)
    return "measured" if within and not rounded else "extrapolated"


def plans_for(certificate: Certificate, context: int) -> list[Plan]:
    """The plans for a memory of `context` tokens, the cheapest first.

    They are those of the shortest measured length that is at least `context`: longer contexts keep
    less, so the figures err on the low side. Beyond all measured lengths they are the longest
    one's, with the trend of all lengths.
    """
    lengths = sorted({p.context for p in certificate.plans})
    length = next((length for length in lengths if length >= context), lengths[-1])
    plans = [p for p in certificate.plans if p.context == length]
    if context <= length:
        return plans
    return [_extrapolated(certificate, plan, lengths, context) for plan in plans]


def with_tail(certificate: Certificate, context: int, tail: int, reread: int = 0) -> Plan:
    """The plan for a memory of that length with the most tokens read natively that are no more
    than `tail` at its end and `reread` in place."""
    return nearest(plans_for(certificate, context), tail, reread)


def nearest(plans: Sequence[Plan], tail: int, reread: int) -> Plan:
    """Of the plans of one length, the one with the longest tail, then the most tokens re-read, that
    are no more than these."""
    within = [p for p in plans if p.tail <= tail and p.reread <= reread]
    return max(within, key=lambda p: (p.tail, p.reread))


def cheapest(
    certificate: Certificate,
    quality_target: float,
    context: int | None = None,
    *,
    tails: bool = True,
    reread: int = 0,
) -> Plan:
    """The cheapest plan of `plans_for` that reaches a retention of `quality_target` at a context of
    that length, by default the protocol's. A plan that its control beats is none.

    Args:
        tails: whether plans with a tail are candidates.
        reread: the most tokens that a candidate may re-read in place.

    Raises:
        QualityUnreachable: no plan does; the error names the best one.
    """
    measured = plans_for(certificate, context or certificate.protocol.context)
    worthwhile = [p for p in measured if not p.beaten and p.reread <= reread]
    plans = [plan for plan in worthwhile if tails or not plan.tail]
    for plan in plans:
        if plan.retention.mean >= quality_target:
            return plan
    remedy = "lower quality_target, let the target read the text itself, or fit a better map"
    if not plans:
        best = max(measured, key=lambda plan: plan.retention.mean)
        raise QualityUnreachable(
            f"no measured plan is worth its cost at a retention of {quality_target:.3f}",
            best=best.retention.mean,
            found="plans that keep no more than reading a part of the text for the same cost",
            remedy=remedy,
        )
    best = max(plans, key=lambda plan: plan.retention.mean)
    if enough := [plan for plan in worthwhile if plan.retention.mean >= quality_target]:
        remedy = (
            f"read the last {enough[0].tail} tokens natively, which was measured to keep "
            f"{enough[0].retention.mean:.3f}; or {remedy}"
        )
    raise QualityUnreachable(
        f"no measured plan reaches a retention of {quality_target:.3f}",
        best=best.retention.mean,
        found=f"at best {best.retention.mean:.3f}, with the last {best.tail} tokens read natively",
        remedy=remedy,
    )


def _extrapolated(
    certificate: Certificate, plan: Plan, lengths: Sequence[int], context: int
) -> Plan:
    """A plan of the longest length, at a longer one."""
    alike = [
        nearest([p for p in certificate.plans if p.context == n], plan.tail, plan.reread)
        for n in lengths
    ]

    def at(figure: str, least: float = -math.inf) -> Interval | None:
        points = [(p.context, interval) for p in alike if (interval := getattr(p, figure))]
        return extrapolated(points, context, least=least) if points else None

    update = {
        "context": context,
        "retention": at("retention", 0.0),
        "margin": at("margin"),
        "facts": at("facts", 0.0),
        "facts_margin": at("facts_margin"),
        "facts_quoted": at("facts_quoted", 0.0),
        "facts_quoted_margin": at("facts_quoted_margin"),
    }
    return plan.model_copy(update=update)


def extrapolated(
    points: Sequence[tuple[int, Interval]], context: int, *, least: float = -math.inf
) -> Interval:
    """A figure beyond the longest of the lengths that it was measured at.

    It goes on falling with the logarithm of the length, by the trend of all measured lengths, and
    never rises; its interval widens downwards by as much as it fell, and at least as by
    ASSUMED_TREND, since nothing was measured there.

    Args:
        least: below which the mean does not fall, unless it was measured there.
    """
    length, last = points[-1]
    further = max(0.0, math.log(context / length))
    fall = further * min(0.0, trend(points))
    mean = max(last.mean + fall, min(least, last.mean))
    low = min(mean, last.ci_low + fall + min(fall, further * ASSUMED_TREND))
    return Interval(mean=mean, ci_low=low, ci_high=max(mean, last.ci_high))


def trend(points: Sequence[tuple[int, Interval]]) -> float:
    """The least squares slope of a figure over the logarithm of the length."""
    if len(points) < 2:
        return ASSUMED_TREND
    x = [math.log(length) for length, _ in points]
    y = [interval.mean for _, interval in points]
    x_mean, y_mean = fmean(x), fmean(y)
    products = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return products / sum((a - x_mean) ** 2 for a in x)
