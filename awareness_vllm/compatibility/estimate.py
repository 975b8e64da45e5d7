"""The retention of one further memory, estimated from a certificate.

A certificate has retention over documents, at some lengths of context and some native tails, each
with an interval of the *mean*. The interval here holds for a single further memory: it includes the
spread between documents, recovered from the interval of the mean (whose half width is 1.96 of that
spread over the root of the number of documents), and, for a kind of text that was not measured, the
spread between kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance

from awareness_vllm.wmatrix.certificate import LENGTH_TEXTS, Certificate, Interval, Plan

Z = NormalDist().inv_cdf(0.975)


def predict(certificate: Certificate, context: int, tail: int, kind: str | None = None) -> Interval:
    """Retention of one memory of `context` tokens whose last `tail` the target reads itself.

    It is interpolated between measured tails and lengths (lengths by their logarithm). Shorter
    memories keep what the shortest measured ones do. Beyond the longest the fall goes on, and the
    interval widens by as much as it fell, since nothing was measured there.

    Args:
        kind: the kind of the text; ignored where the certificate does not have it.
    """
    lengths = sorted({plan.context for plan in certificate.plans})
    points = [(math.log(n), at_tail(certificate, n, tail, kind)) for n in lengths]
    return along(points, math.log(context))


def at_tail(certificate: Certificate, length: int, tail: int, kind: str | None) -> Interval:
    """One memory's retention at a measured length. A tail longer than all keeps what they do."""
    plans = sorted((p for p in certificate.plans if p.context == length), key=lambda p: p.tail)
    count, kinds = texts_at(certificate, length), between_kinds(certificate, tail)
    points = [(float(p.tail), one_of(p, count, kind, kinds)) for p in plans]
    return along(points, min(float(tail), points[-1][0]))


def texts_at(certificate: Certificate, length: int) -> int:
    """The number of documents that a length was measured on, at most."""
    count = certificate.counts["texts"]
    return count if length == certificate.protocol.context else min(count, LENGTH_TEXTS)


def one_of(plan: Plan, count: int, kind: str | None, kinds: float) -> Interval:
    """The interval that one further document lies in, from those of the means of `count`: around
    the mean of its kind where that is known, else wider by the spread of `kinds`."""
    known = plan.kinds.get(kind or "")
    spread = sd(plan.retention) * math.sqrt(count + 1)
    if known is None:
        spread = math.hypot(spread, kinds)
    mean = (known or plan.retention).mean
    half = quantile(count - 1) * spread
    return Interval(mean=mean, ci_low=mean - half, ci_high=mean + half)


def between_kinds(certificate: Certificate, tail: int) -> float:
    """The standard deviation of retention between kinds of text, less that of chance, at the
    protocol's own length, where each kind has several documents."""
    plans = [p for p in certificate.plans if p.context == certificate.protocol.context]
    kinds = min(plans, key=lambda p: abs(p.tail - tail)).kinds.values() if plans else ()
    if len(kinds) < 2:
        return 0.0
    total = variance(i.mean for i in kinds)
    chance = fmean(sd(i) ** 2 for i in kinds)
    return math.sqrt(max(0.0, total - chance))


def sd(interval: Interval) -> float:
    """The standard deviation of a mean, from its 95 % interval."""
    return (interval.ci_high - interval.ci_low) / (2 * Z)


def quantile(freedom: int) -> float:
    """Student's t at 97.5 %, by its expansion's first term: within 1 % from fifteen degrees on."""
    return Z + (Z**3 + Z) / (4 * max(1, freedom))


def along(points: Sequence[tuple[float, Interval]], x: float) -> Interval:
    """A curve of intervals at x: linear between its points, level before the first, and after the
    last with its last slope if it falls, ever wider."""
    before = [p for p in points if p[0] <= x] or [points[0]]
    after = [p for p in points if p[0] >= x]
    (x0, low), (x1, high) = before[-1], after[0] if after else points[-1]
    if not after and len(points) > 1:
        (xa, a), (xb, b) = points[-2:]
        fall = min(0.0, (b.mean - a.mean) / (xb - xa) * (x - xb))
        mean = max(0.0, b.mean + fall)
        return Interval(mean=mean, ci_low=mean - (b.mean - b.ci_low) + fall, ci_high=b.ci_high)
    share = 0.0 if x <= x0 or x1 == x0 else (x - x0) / (x1 - x0)
    return Interval(
        **{
            name: (1 - share) * getattr(low, name) + share * getattr(high, name)
            for name in ("mean", "ci_low", "ci_high")
        }
    )
