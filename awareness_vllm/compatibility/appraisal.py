"""From a case to its report: each figure from what was measured, else as published, else none."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from awareness_vllm.compatibility.advice import advice
from awareness_vllm.compatibility.case import Case
from awareness_vllm.compatibility.estimate import at_tail, predict
from awareness_vllm.compatibility.load_time.cost import load_times_s, target_memory_gb
from awareness_vllm.compatibility.load_time.speed import saved
from awareness_vllm.compatibility.priors import find_name, positional_impact, published_retention
from awareness_vllm.compatibility.report import (
    COPIED,
    LEVELS,
    UNUSABLE,
    Basis,
    CompatibilityReport,
    Curve,
    RiskFactor,
    Share,
    level_of,
)
from awareness_vllm.compatibility.risks import risks
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import TIERS, Certificate, Interval

Known = tuple[Interval, Basis]


def report(case: Case) -> CompatibilityReport:
    """Everything that is known of a case.

    Raises:
        BadInput: a kind of text that nobody published.
    """
    interval, basis = expected(case) or (None, None)
    dangers, certificate = risks(case), case.certificate
    score = scored(interval, dangers)
    level, recommendation = level_of(capped(score, facts(case)))
    if basis is not None and basis.kind == "prior":
        recommendation += ", going by published figures that nobody here measured"
    positional, positional_basis = positions(case) or (None, None)
    times = load_times(case)
    return CompatibilityReport(
        memory=case.subject.name,
        source=case.subject.source.name,
        target=case.target.name,
        tokens=case.tokens,
        compatibility_score=score,
        estimated_retention=interval.mean if interval else None,
        ci_low=interval.ci_low if interval else None,
        ci_high=interval.ci_high if interval else None,
        basis=basis,
        level=level,
        recommendation=recommendation,
        facts=facts(case),
        on_itself=case.found.retention if case.found else None,
        head_mapping_quality=head_mapping(case),
        positional_compatibility=positional,
        positional_basis=positional_basis,
        target_memory_gb=memory_gb(case),
        estimated_load_time_s=times.get("cold"),
        load_times_s=times,
        risk_factors=dangers,
        actions=advice(case, interval.mean if interval else None),
        arms=arms(case),
        curves=curves(certificate) if certificate else (),
        kinds=certificate.plans[0].kinds if certificate else {},
        degradation=shares(case),
    )


def expected(case: Case) -> Known | None:
    """Retention and where it comes from; None where nobody knows.

    A memory's own last part is few tokens: where there is a certificate, it errs less
    (docs/fidelity-log.md), and the measurement stands beside it.
    """
    if case.exact:
        return COPIED, Basis(kind="exact", source="the same model: its states are copied")
    if case.certificate is not None and case.entry is not None:
        said = predict(case.certificate, case.tokens, case.config.tail, case.kind)
        return said, Basis(kind="measured", source=str(case.entry), digest=case.entry.digest)
    if case.found is not None and case.subject.manifest is not None:
        digest = case.subject.manifest.payload
        basis = Basis(kind="measured", source="its own last part", digest=digest)
        return case.found.retention, basis
    ends = find_name(case.subject.source.name), find_name(case.target.name)
    if ends[0] is None or ends[1] is None:
        return None
    return published_retention(ends[0], ends[1], case.tokens, case.kind)


def scored(retention: Interval | None, dangers: Sequence[RiskFactor]) -> float | None:
    """Retention between 0 and 1; 0 where the memory cannot be loaded at all."""
    if any(UNUSABLE in danger.description for danger in dangers):
        return 0.0
    return None if retention is None else min(max(retention.mean, 0.0), 1.0)


def capped(score: float | None, recalled: Interval | None) -> float | None:
    """The score that the level is read off: fewer facts than a tier asks for lower it to below the
    level above that tier, since retention alone hides their loss."""
    if score is None or recalled is None:
        return score
    tier = next((i for i, (_, least) in enumerate(TIERS) if recalled.mean >= least), len(TIERS))
    return min(score, LEVELS[tier - 1][0]) if tier else score


def facts(case: Case) -> Interval | None:
    """Fact recall as a share of native."""
    if case.exact:
        return COPIED
    return case.certificate.facts if case.certificate else None


def head_mapping(case: Case) -> float | None:
    """The overlap of attention distributions with native ones, a mean over layers."""
    if case.exact:
        return 1.0
    if case.certificate is None or case.certificate.metrics is None:
        return None
    return fmean(case.certificate.metrics.attention_fidelity)


def positions(case: Case) -> tuple[float, Basis] | None:
    """What is left after the conversion of positions, as published for such encodings. Of a map
    here it takes nothing by itself: positions are taken off and put on exactly."""
    if case.exact:
        return 1.0, Basis(kind="exact", source="positions stay as they are")
    source, target = case.subject.source.geometry, case.target.geometry
    if source is None or target is None:
        return None
    return published_positions(source, target)


def published_positions(source: Geometry, target: Geometry) -> tuple[float, Basis] | None:
    """The middle of the published range, by the encodings of the first layers that have one."""
    schemes = [
        next((la.positions.scheme for la in g.layers if la.positions.scheme != "none"), "none")
        for g in (source, target)
    ]
    window = next((layer.window for layer in source.layers if layer.window), None)
    impact = positional_impact(schemes[0], schemes[1], window)
    if impact is None:
        return None
    return 1 - fmean(impact), Basis(kind="prior", source=f"{schemes[0]} → {schemes[1]}, published")


def memory_gb(case: Case) -> float | None:
    """The KV cache that the memory takes, in 1e9 bytes."""
    if case.target.geometry is None:
        return None
    return target_memory_gb(case.target.geometry, case.tokens, case.config)


def load_times(case: Case) -> dict[str, float]:
    """Seconds by temperature, by what `awareness doctor` measured of this machine; nothing where
    it has not."""
    calibration, size = saved(), case.subject.bytes
    if case.target.geometry is None or calibration is None or size is None:
        return {}
    if not case.exact and case.entry is None:
        return {}
    return load_times_s(
        case.target.geometry,
        case.tokens,
        case.config,
        calibration,
        package_bytes=size,
        wmatrix=None if case.exact or case.entry is None else case.entry.manifest,
    )


def arms(case: Case) -> dict[str, dict[str, float]]:
    """The five arms: on the memory itself where it was measured, else the certificate's."""
    if case.found is not None:
        return {arm: {"nll": nll} for arm, nll in case.found.arms.items()}
    return case.certificate.texts if case.certificate and not case.exact else {}


def curves(certificate: Certificate) -> tuple[Curve, ...]:
    """Retention of one memory by length: the map alone, and with its shortest measured tail."""
    lengths = sorted({plan.context for plan in certificate.plans})
    tails = sorted({plan.tail for plan in certificate.plans})[:2]
    return tuple(
        Curve(
            tail=tail,
            contexts=tuple(lengths),
            retention=tuple(at_tail(certificate, n, tail, None) for n in lengths),
        )
        for tail in tails
    )


def shares(case: Case) -> tuple[Share, ...]:
    """What a naive conversion was measured to lose by. By the divergence from native predictions,
    which needs fewer texts than the surprise at what came."""
    return case.degradation.shares(case.tokens, "kl") if case.degradation else ()
