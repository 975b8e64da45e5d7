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
from awareness_vllm.wmatrix.plans import extrapolated

MOST = 1.02
"""What no estimate exceeds: a memory keeps no more than there is, but for the chance of its own
text."""
Z = NormalDist().inv_cdf(0.975)


def predict(
    certificate: Certificate, context: int, tail: int, kind: str | None = None, *, reread: int = 0
) -> Interval:
    """Retention of one memory of `context` tokens, the last `tail` of which the target reads
    itself, and up to `reread` more where the question points.

    It is interpolated between measured tails and lengths (lengths by their logarithm). Shorter
    memories keep what the shortest measured ones do. Beyond the longest the fall goes on, and the
    interval widens by as much as it fell, since nothing was measured there. It ends at MOST.

    Args:
        kind: the kind of the text; ignored where the certificate does not have it.
    """
    lengths = sorted({plan.context for plan in certificate.plans})
    points = [(n, at_tail(certificate, n, tail, kind, reread)) for n in lengths]
    if context > lengths[-1]:
        found = extrapolated(points, context, least=0.0)
    else:
        found = along([(math.log(n), i) for n, i in points], math.log(context))
    return Interval(**{name: min(figure, MOST) for name, figure in found})


def at_tail(
    certificate: Certificate, length: int, tail: int, kind: str | None, reread: int
) -> Interval:
    """One memory's retention at a measured length. A tail longer than all keeps what they do."""
    measured = [p for p in certificate.plans if p.context == length]
    reread = max(p.reread for p in measured if p.reread <= reread)
    plans = sorted((p for p in measured if p.reread == reread), key=lambda p: p.tail)
    kinds = between_kinds(certificate, tail)
    points = [(float(p.tail), one_of(p, texts_of(certificate, p), kind, kinds)) for p in plans]
    return along(points, min(float(tail), points[-1][0]))


def texts_of(certificate: Certificate, plan: Plan) -> int:
    """The number of documents that a plan was measured on; of version 0.1 at most."""
    count = certificate.counts["texts"]
    of_length = count if plan.context == certificate.protocol.context else min(count, LENGTH_TEXTS)
    return plan.texts or of_length


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
    """A curve of intervals at x: linear between its points, level before the first."""
    before = [p for p in points if p[0] <= x] or [points[0]]
    after = [p for p in points if p[0] >= x]
    (x0, low), (x1, high) = before[-1], after[0]
    share = 0.0 if x <= x0 or x1 == x0 else (x - x0) / (x1 - x0)
    return Interval(
        **{
            name: (1 - share) * getattr(low, name) + share * getattr(high, name)
            for name in ("mean", "ci_low", "ci_high")
        }
    )
