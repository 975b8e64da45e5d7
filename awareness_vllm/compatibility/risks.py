"""What may make a memory worth less than the estimate says, or unusable: registered functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from awareness_vllm.compatibility.case import Case
from awareness_vllm.compatibility.findings import findings
from awareness_vllm.compatibility.report import UNUSABLE, Impact, RiskFactor
from awareness_vllm.errors import AwarenessError
from awareness_vllm.wmatrix.certificate import TIERS

Risk = Callable[[Case], Iterator[tuple[Impact, str]]]
RISKS: list[Risk] = []

FEW_TEXTS = 32
"""Documents fewer than this can differ from others by 0.08 in the mean (docs/fidelity-log.md)."""


def risk(function: Risk) -> Risk:
    """Register a function that gives impacts and descriptions."""
    RISKS.append(function)
    return function


def risks(case: Case) -> tuple[RiskFactor, ...]:
    """All risks of a case, the worst first."""
    found = [RiskFactor(impact=i, description=says) for one in RISKS for i, says in one(case)]
    if case.target.geometry is not None:
        found += findings(case.config, case.target.geometry, case.tokens)
    return tuple(sorted(found, key=lambda r: ("high", "medium", "low").index(r.impact)))


@risk
def no_way(case: Case) -> Iterator[tuple[Impact, str]]:
    """A memory of another model that nothing realigns."""
    known = case.subject.source.geometry and case.target.geometry
    if case.exact or case.entry is not None or not known:
        return
    ends = f"from {case.subject.source.name} to {case.target.name}"
    yield "high", f"no W-Matrix leads {ends}: {UNUSABLE}"


@risk
def lost_states(case: Case) -> Iterator[tuple[Impact, str]]:
    """States that a window has lost, in layers that are read."""
    manifest = case.subject.manifest
    if manifest is None:
        return
    read = case.entry.manifest.layers if case.entry else ()
    layers = range(len(manifest.geometry.layers)) if case.exact else read
    try:
        manifest.check_whole(layers)
    except AwarenessError as error:
        yield "high", f"{error.what}: {UNUSABLE}"


@risk
def unmeasured(case: Case) -> Iterator[tuple[Impact, str]]:
    if case.entry is not None and case.certificate is None:
        yield "high", "the W-Matrix has no certificate: nobody has measured what it keeps"


@risk
def beyond_measured(case: Case) -> Iterator[tuple[Impact, str]]:
    """Lengths and kinds of text that the certificate has not seen."""
    if case.certificate is None:
        return
    longest = max(plan.context for plan in case.certificate.plans)
    if case.tokens > longest:
        impact: Impact = "high" if case.tokens > 2 * longest else "medium"
        yield impact, f"{case.tokens} tokens, and nobody has measured more than {longest}"
    if (count := case.certificate.counts["texts"]) < FEW_TEXTS:
        yield "medium", f"the certificate is from {count} texts: others may differ"
    kinds = {kind for plan in case.certificate.plans for kind in plan.kinds}
    if case.kind is None or case.kind not in kinds:
        yield "low", f"measured on {', '.join(sorted(kinds))}, not on text like this"


@risk
def lost_facts(case: Case) -> Iterator[tuple[Impact, str]]:
    """Facts that retention alone hides the loss of."""
    if case.certificate is None:
        return
    kept = case.certificate.facts.mean
    if kept < TIERS[0][1]:
        impact: Impact = "high" if kept < TIERS[1][1] else "medium"
        yield impact, f"names, places and codes: only {kept:.2f} of those recalled natively"


@risk
def published_only(case: Case) -> Iterator[tuple[Impact, str]]:
    if case.subject.source.geometry is None or case.target.geometry is None:
        yield "high", "known by published figures alone: nobody here measured them, or can load it"
