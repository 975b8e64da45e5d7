"""A certificate as lines of text."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from awareness_vllm.wmatrix.certificate import Certificate, Interval, Metrics, Plan


def lines(document: dict[str, Any]) -> list[str]:
    """The lines of a certificate, as it is in a W-Matrix's manifest."""
    certificate = Certificate.model_validate(document)
    counts = certificate.counts
    return [
        f"certified {certificate.measured}: tier {certificate.tier or 'none'} "
        f"({counts['texts']} texts of {certificate.protocol.context} tokens, "
        f"{counts.get('cases', 0)} facts; {certificate.hardware})",
        interval("retention", certificate.retention),
        *(line for plan in certificate.plans for line in plan_lines(plan)),
        interval("facts, share of native", certificate.facts),
        *(interval(f"  {kind}", i) for kind, i in certificate.facts_kinds.items()),
        *(interval(f"  {distance}", i) for distance, i in certificate.facts_distances.items()),
        interval("above tokens only, nats", certificate.margin),
        interval("above tokens only, facts", certificate.facts_margin),
        *(metric_lines(certificate.metrics) if certificate.metrics else ()),
    ]


def plan_lines(plan: Plan) -> list[str]:
    """The lines of a plan: its retention on all texts, and on each kind."""
    head = f"{plan.context} tokens, tail {plan.tail}, cost {plan.cost:.0%}"
    if plan.reread:
        head = f"{plan.context} tokens, {plan.tail} + {plan.reread}, cost {plan.cost:.0%}"
    facts = [("facts, share of native", plan.facts)] if plan.facts else []
    facts += [(f"  {name}", i) for name, i in plan.facts_controls.items()]
    facts += [("  margin", plan.facts_margin)] if plan.facts_margin else []
    facts += [("  passages quoted instead", plan.facts_quoted)] if plan.facts_quoted else []
    facts += [("    margin", plan.facts_quoted_margin)] if plan.facts_quoted_margin else []
    return [
        f"{interval(head, plan.retention)}   top-1 {plan.top1:.3f}",
        *(interval(f"  {kind}", i) for kind, i in sorted(plan.kinds.items())),
        interval("  tokens only", plan.tokens_only),
        *(interval(f"  {name}", i) for name, i in plan.controls.items()),
        margin_line(plan),
        *(interval(f"  {name}", i) for name, i in facts),
        *(f"      {kind:30}{matches(arms)}" for kind, arms in sorted(plan.facts_kinds.items())),
    ]


def margin_line(plan: Plan) -> str:
    """A plan's margin over the best control, or why it claims none."""
    if plan.margin is None:
        return "    no controls measured: no margin is known"
    line = interval("  margin over the best control", plan.margin)
    return line + "   not worth its cost: never chosen" * plan.beaten


def matches(arms: dict[str, float]) -> str:
    """The exact matches of each arm."""
    return "  ".join(f"{arm} {share:.2f}" for arm, share in arms.items())


def metric_lines(metrics: Metrics) -> list[str]:
    stable = "pass" if metrics.gradient_stability else "fail"
    return [
        f"  {'semantic preservation':34}{fmean(metrics.semantic_preservation):7.3f}",
        f"  {'attention fidelity':34}{fmean(metrics.attention_fidelity):7.3f}",
        f"  {'gradient stability':34}{stable:>7}",
    ]


def interval(name: str, i: Interval) -> str:
    return f"  {name:34}{i.mean:7.3f}   95 % CI {i.ci_low:.3f} … {i.ci_high:.3f}"
