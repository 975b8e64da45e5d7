"""The certificate: what a W-Matrix was measured to keep, by which protocol, on what."""

from __future__ import annotations

import datetime

from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.schema import FrozenModel

TIERS = ((0.90, 0.85), (0.82, 0.60), (0.75, 0.30), (0.60, 0.0))
"""Lowest retention and lowest share of facts of tiers 1 to 4. The retentions are the lower ends of
the ranges published with the tiers; the facts are ours: retention alone hides their loss."""
TAIL = 16
"""Last tokens of a realigned memory that the target reads itself, by default, after the rest: what
is asked follows them at once, and they bring more retention than anything else at their price
(docs/fidelity-log.md). More of them bring more, and take longer (`awareness serve --tail`)."""
LENGTH_TEXTS = 16
"""Texts for each further length of context: a long one costs many short ones."""


class Interval(FrozenModel):
    """A measured figure with its 95 % bootstrap interval over documents."""

    mean: float
    ci_low: float
    ci_high: float


class Protocol(FrozenModel):
    """What was measured on, and how. `texts` and `cases` are digests; `limit` documents of them
    were taken evenly; `context` tokens of memory, `continuation` tokens scored after it."""

    texts: str
    cases: str
    limit: int
    context: int
    continuation: int
    sources: tuple[str, ...] = ()
    """The folders and files that the texts came from; version 0.1 did not record them."""


class Plan(FrozenModel):
    """A way to load a memory of `context` tokens: the map for most of it, the last `tail` tokens
    read natively.

    `cost` is its share of the target's floating point operations for reading the whole context;
    `kinds` is the retention by the folder that a text came from, `tokens_only` that of the same
    plan with the source's states blanked. `facts` is fact recall as a share of native, where it
    was measured.
    """

    context: int
    tail: int
    cost: float
    retention: Interval
    kinds: dict[str, Interval]
    top1: float
    tokens_only: Interval
    facts: Interval | None = None


class Metrics(FrozenModel):
    """Means over texts.

    `semantic_preservation` [layers] is the cosine of a token's aligned keys and values of a layer
    to the target's own; `attention_fidelity` [layers] the overlap of the attention distributions,
    from 0 to 1; `gradient_ratio` the norm of the gradient of the continuation's loss in the
    memory's states, as a share of native, `gradient_stability` whether all texts' are finite and
    within ten times either way.
    """

    semantic_preservation: tuple[float, ...]
    attention_fidelity: tuple[float, ...]
    gradient_ratio: float
    gradient_stability: bool
    n: int


class Certificate(FrozenModel):
    """The five arms' figures and what follows from them.

    `margin` is what the source's states add to the text alone: NLL of the tokens-only arm less the
    memory arm's, in nats. `facts` is fact recall as a share of native, by kind of fact and by
    tokens between it and the question, `facts_margin` the memory arm's exact match less the
    tokens-only arm's. `retention` and `facts` are the map's alone; `plans` are the ways to load
    that were measured, for each length of context the cheapest first. Without `metrics`: the map
    gives tokens of its own, which do not compare with the target's.
    """

    protocol: Protocol
    texts: dict[str, dict[str, float]]
    cases: dict[str, dict[str, float]]
    metrics: Metrics | None
    retention: Interval
    margin: Interval
    plans: tuple[Plan, ...]
    facts: Interval
    facts_kinds: dict[str, Interval]
    facts_distances: dict[str, Interval]
    facts_margin: Interval
    counts: dict[str, int]
    tier: int | None
    measured: datetime.date
    hardware: str
    versions: dict[str, str]


def measured_for(certificate: Certificate, context: int) -> list[Plan]:
    """The plans of the shortest measured length that `context` does not exceed, else of the longest
    one, the cheapest first: longer contexts keep less, so this promises too little, not too much.
    """
    lengths = sorted({p.context for p in certificate.plans})
    length = next((length for length in lengths if length >= context), lengths[-1])
    return [p for p in certificate.plans if p.context == length]


def with_tail(certificate: Certificate, context: int, tail: int) -> Plan:
    """The measured plan for a context of that length that reads at most so many tokens natively."""
    plans = measured_for(certificate, context)
    return max((p for p in plans if p.tail <= tail), key=lambda p: p.tail)


def cheapest(
    certificate: Certificate,
    quality_target: float,
    context: int | None = None,
    *,
    tails: bool = True,
) -> Plan:
    """The cheapest measured plan that keeps so much of a context of that length (by default the
    protocol's), see `measured_for`; with `tails` false, of those that read nothing natively.

    Raises:
        QualityUnreachable: none does; the best one and what would reach it are named.
    """
    measured = measured_for(certificate, context or certificate.protocol.context)
    plans = [plan for plan in measured if tails or not plan.tail]
    for plan in plans:
        if plan.retention.mean >= quality_target:
            return plan
    best = max(plans, key=lambda plan: plan.retention.mean)
    enough = [plan for plan in measured if plan.retention.mean >= quality_target]
    remedy = "lower quality_target, let the target read the text itself, or fit a better map"
    if enough:
        remedy = (
            f"read the last {enough[0].tail} tokens natively, which was measured to keep "
            f"{enough[0].retention.mean:.3f}; or {remedy}"
        )
    raise QualityUnreachable(
        f"no measured plan keeps {quality_target:.3f}",
        best=best.retention.mean,
        found=f"at best {best.retention.mean:.3f}, with the last {best.tail} tokens read natively",
        remedy=remedy,
    )


def tier(retention: float, facts: float) -> int | None:
    """1 (excellent) to 4 (marginal); None below all of them."""
    for number, (least, least_facts) in enumerate(TIERS, 1):
        if retention >= least and facts >= least_facts:
            return number
    return None
