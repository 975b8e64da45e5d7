"""From a case to its report: each figure from what was measured, else as published, else none."""

from __future__ import annotations

from statistics import fmean

from awareness_vllm.compatibility.advice import advice
from awareness_vllm.compatibility.context import CheckContext
from awareness_vllm.compatibility.estimate import at_tail, predict
from awareness_vllm.compatibility.load_time.cost import load_times_s, target_memory_gb
from awareness_vllm.compatibility.load_time.speed import saved
from awareness_vllm.compatibility.priors import find_name, positional_impact, published_retention
from awareness_vllm.compatibility.report import (
    COPIED,
    LEVELS,
    Basis,
    CompatibilityReport,
    Curve,
    Share,
    level_of,
)
from awareness_vllm.compatibility.risks import risks
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import TIERS, Certificate, Interval

Known = tuple[Interval, Basis]


def report(check: CheckContext) -> CompatibilityReport:
    """Everything that is known of a case.

    Raises:
        BadInput: a kind of text that nobody published.
    """
    interval, basis = expected(check) or (None, None)
    dangers, certificate = risks(check), check.certificate
    score = scored(check, interval)
    level, recommendation = level_of(capped(score, facts(check)))
    if basis is not None and basis.kind == "prior":
        recommendation += ", going by published figures that nobody here measured"
    positional, positional_basis = positions(check) or (None, None)
    times = load_times(check)
    return CompatibilityReport(
        memory=check.subject.name,
        source=check.subject.source.name,
        target=check.target.name,
        tokens=check.tokens,
        compatibility_score=score,
        estimated_retention=interval.mean if interval else None,
        ci_low=interval.ci_low if interval else None,
        ci_high=interval.ci_high if interval else None,
        basis=basis,
        level=level,
        recommendation=recommendation,
        refusal=None if check.refusal is None else str(check.refusal),
        facts=facts(check),
        on_itself=check.found.retention if check.found else None,
        head_mapping_quality=head_mapping(check),
        positional_compatibility=positional,
        positional_basis=positional_basis,
        target_memory_gb=memory_gb(check),
        estimated_load_time_s=times.get("cold"),
        load_times_s=times,
        risk_factors=dangers,
        actions=advice(check, interval.mean if interval else None),
        conditions=conditions(check),
        curves=curves(certificate) if certificate else (),
        kinds=certificate.plans[0].kinds if certificate else {},
        degradation=shares(check),
    )


def expected(check: CheckContext) -> Known | None:
    """Retention and where it comes from; None where it is unknown, or the memory refused.

    A memory's own last part is few tokens: where there is a certificate, it errs less
    (docs/fidelity-log.md), and the measurement stands beside it.
    """
    if check.refusal is not None:
        return None
    if check.exact:
        return COPIED, Basis(kind="exact", source="the same model: its states are copied")
    if check.certificate is not None and check.entry is not None:
        said = predict(check.certificate, check.tokens, check.config.tail, check.kind)
        return said, Basis(kind="measured", source=str(check.entry), digest=check.entry.digest)
    if check.found is not None and check.subject.manifest is not None:
        digest = check.subject.manifest.payload
        basis = Basis(kind="measured", source="its own last part", digest=digest)
        return check.found.retention, basis
    ends = find_name(check.subject.source.name), find_name(check.target.name)
    if ends[0] is None or ends[1] is None:
        return None
    return published_retention(ends[0], ends[1], check.tokens, check.kind)


def scored(check: CheckContext, retention: Interval | None) -> float | None:
    """Retention between 0 and 1; 0 where the memory cannot be loaded."""
    if check.refusal is not None:
        return 0.0
    return None if retention is None else min(max(retention.mean, 0.0), 1.0)


def capped(score: float | None, recalled: Interval | None) -> float | None:
    """The score that the level is read off: fewer facts than a tier asks for lower it to below the
    level above that tier, since retention alone hides their loss."""
    if score is None or recalled is None:
        return score
    tier = next((i for i, (_, least) in enumerate(TIERS) if recalled.mean >= least), len(TIERS))
    return min(score, LEVELS[tier - 1][0]) if tier else score


def facts(check: CheckContext) -> Interval | None:
    """Fact recall as a share of native."""
    if check.refusal is not None:
        return None
    if check.exact:
        return COPIED
    return check.certificate.facts if check.certificate else None


def head_mapping(check: CheckContext) -> float | None:
    """The overlap of attention distributions with native ones, a mean over layers."""
    if check.exact:
        return 1.0
    if check.certificate is None or check.certificate.metrics is None:
        return None
    return fmean(check.certificate.metrics.attention_fidelity)


def positions(check: CheckContext) -> tuple[float, Basis] | None:
    """What is left after the conversion of positions, as published for such encodings. Of a map
    here it takes nothing by itself: positions are taken off and put on exactly."""
    if check.exact:
        return 1.0, Basis(kind="exact", source="positions stay as they are")
    source, target = check.subject.source.geometry, check.target.geometry
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


def memory_gb(check: CheckContext) -> float | None:
    """The KV cache that the memory takes, in 1e9 bytes."""
    if check.target.geometry is None:
        return None
    return target_memory_gb(check.target.geometry, check.tokens, check.config)


def load_times(check: CheckContext) -> dict[str, float]:
    """Seconds by temperature, by what `awareness doctor` measured of this machine; nothing where
    it has not."""
    calibration, size = saved(), check.subject.bytes
    if check.target.geometry is None or calibration is None or size is None:
        return {}
    if not check.exact and check.entry is None:
        return {}
    return load_times_s(
        check.target.geometry,
        check.tokens,
        check.config,
        calibration,
        package_bytes=size,
        wmatrix=None if check.exact or check.entry is None else check.entry.manifest,
    )


def conditions(check: CheckContext) -> dict[str, dict[str, float]]:
    """The five arms: on the memory itself where it was measured, else the certificate's."""
    if check.found is not None:
        return {arm: {"nll": nll} for arm, nll in check.found.conditions.items()}
    return check.certificate.texts if check.certificate and not check.exact else {}


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


def shares(check: CheckContext) -> tuple[Share, ...]:
    """What a naive conversion was measured to lose by. By the divergence from native predictions,
    which needs fewer texts than the surprise at what came."""
    return check.degradation.shares(check.tokens, "kl") if check.degradation else ()
