"""The report of a check: each figure as measured, else as published, else unknown."""

from __future__ import annotations

from statistics import fmean

from awareness_vllm.compatibility.advice import advice
from awareness_vllm.compatibility.context import CheckContext
from awareness_vllm.compatibility.estimate import at_tail, predict
from awareness_vllm.compatibility.load_time.cost import (
    MapSize,
    decoding,
    load_times_s,
    target_memory_gb,
    typical_map,
)
from awareness_vllm.compatibility.load_time.speed import REFERENCE, saved
from awareness_vllm.compatibility.models import Model
from awareness_vllm.compatibility.priors import (
    find_name,
    positional_impact,
    published_architecture,
    published_retention,
    without_loss_by,
)
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
from awareness_vllm.passages import BUDGET
from awareness_vllm.wmatrix.certificate import TIERS, Certificate, Interval, Plan
from awareness_vllm.wmatrix.manifest import WMatrixManifest
from awareness_vllm.wmatrix.plans import with_tail
from awareness_vllm.wmatrix.registry import WMatrixEntry

Known = tuple[Interval, Basis]
Figure = tuple[float, Basis]


def report(check: CheckContext) -> CompatibilityReport:
    """The report of a memory on a target.

    Raises:
        BadInput: an unknown kind of text, where published figures are asked.
    """
    known = expected(check)
    interval, basis = known or (None, None)
    certificate, plan = check.certificate, plan_of(check)
    score = scored(check, interval)
    level, recommendation = level_of(capped(score, facts(check)))
    if basis is not None and basis.kind == "claimed":
        recommendation += ", by a certificate that nobody signed whom you trust"
    if basis is not None and basis.kind == "prior":
        recommendation += ", by published figures that were not measured here"
    heads, heads_basis = head_mapping(check, known) or (None, None)
    positional, positional_basis = positions(check, known) or (None, None)
    memory, memory_basis = memory_gb(check) or (None, None)
    times, times_basis = load_times(check)
    return CompatibilityReport(
        memory=check.memory.name,
        source=check.memory.source.name,
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
        signed_by=check.signers,
        margin=plan.margin if plan else None,
        controls=plan.controls if plan else {},
        facts=facts(check),
        facts_margin=plan.facts_margin if plan else None,
        on_itself=check.self_test.retention if check.self_test else None,
        head_mapping_quality=heads,
        head_mapping_basis=heads_basis,
        positional_compatibility=positional,
        positional_basis=positional_basis,
        target_memory_gb=memory,
        target_memory_basis=memory_basis,
        estimated_load_time_s=times.get("cold"),
        load_time_basis=times_basis,
        load_times_s=times if times_basis and times_basis.kind == "measured" else {},
        risk_factors=risks(check),
        actions=advice(check, interval.mean if interval else None),
        conditions=conditions(check),
        curves=curves(certificate) if certificate else (),
        kinds=certificate.plans[0].kinds if certificate else {},
        degradation=shares(check),
    )


def expected(check: CheckContext) -> Known | None:
    """Retention with its basis; None where it is unknown, or the memory refused.

    A certificate goes before the measurement of the memory on itself, which has few tokens and errs
    more (docs/fidelity-log.md).
    """
    if check.refusal is not None:
        return None
    if check.exact:
        return COPIED, Basis(kind="exact", source="the same model: its states are copied")
    if check.certificate is not None and check.entry is not None:
        config = check.config
        retention = predict(
            check.certificate, check.tokens, config.tail, check.kind, reread=config.reread
        )
        return retention, certified(check, check.certificate, check.entry)
    if check.self_test is not None and check.memory.manifest is not None:
        digest = check.memory.manifest.payload
        basis = Basis(kind="measured", source="its own last part", digest=digest)
        return check.self_test.retention, basis
    names = find_name(check.memory.source.name), find_name(check.target.name)
    if names[0] is None or names[1] is None:
        return None
    return published_retention(names[0], names[1], check.tokens, check.kind)


def certified(check: CheckContext, certificate: Certificate, entry: WMatrixEntry) -> Basis:
    """The basis of what a map's certificate says of the memory."""
    return Basis(kind=check.basis_of(certificate), source=str(entry), digest=entry.digest)


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
    """Fact recall as a share of native: of the plan, else of the map alone, as version 0.1 measured
    it at one length."""
    if check.refusal is not None:
        return None
    if check.exact:
        return COPIED
    if check.certificate is None:
        return None
    plan = plan_of(check)
    return (plan and plan.facts) or check.certificate.facts


def plan_of(check: CheckContext) -> Plan | None:
    """The certificate's plan for this memory by the target's settings; None without one."""
    if check.certificate is None or check.exact or check.refusal is not None:
        return None
    return with_tail(check.certificate, check.tokens, check.config.tail, check.config.reread)


def head_mapping(check: CheckContext, known: Known | None) -> Figure | None:
    """The overlap of attention distributions with native ones, a mean over layers; as a prior what
    the published share of head redistribution in the loss leaves."""
    if check.exact:
        return 1.0, Basis(kind="exact", source="heads stay as they are")
    if check.certificate is not None and check.certificate.metrics is not None and check.entry:
        overlap = fmean(check.certificate.metrics.attention_fidelity)
        return overlap, certified(check, check.certificate, check.entry)
    return published_share("Head Redistribution Error", known)


def positions(check: CheckContext, known: Known | None) -> Figure | None:
    """What the conversion of positions leaves, as published for such encodings, or else by its
    published share in the loss. A map here loses nothing by it: positions are exact."""
    if check.exact:
        return 1.0, Basis(kind="exact", source="positions stay as they are")
    source, target = (encoding(model) for model in (check.memory.source, check.target))
    impact = positional_impact(source[0], target[0], source[1]) if source and target else None
    if source is None or target is None or impact is None:
        return published_share("Positional Re-encoding Drift", known)
    return 1 - fmean(impact), Basis(kind="prior", source=f"{source[0]} → {target[0]}, published")


def published_share(source: str, known: Known | None) -> Figure | None:
    """What one source of degradation leaves of a published retention; None without one."""
    if known is None or known[1].kind != "prior":
        return None
    basis = Basis(kind="prior", source=f"{source}: its published share of the loss")
    return without_loss_by(source, known[0].mean), basis


def encoding(model: Model) -> tuple[str, bool] | None:
    """A model's positional scheme, that of its first layer with one, and whether it has sliding
    windows; None where it is unknown."""
    if model.geometry is not None:
        layers = model.geometry.layers
        schemes = (layer.positions.scheme for layer in layers)
        scheme = next((scheme for scheme in schemes if scheme != "none"), "none")
        return scheme, any(layer.window for layer in layers)
    shape = published_architecture(model.name)
    return None if shape is None else (shape.positions, shape.window)


def memory_gb(check: CheckContext) -> Figure | None:
    """The KV cache that the memory takes, in 1e9 bytes."""
    shape = check.target.shape
    if shape is None:
        return None
    basis = Basis(kind="exact", source="computed from the model's geometry")
    if check.target.geometry is None:
        source = "upper bound by the published architecture: all its heads have keys and values"
        basis = Basis(kind="prior", source=source)
    return target_memory_gb(shape, check.tokens, check.config), basis


def load_times(check: CheckContext) -> tuple[dict[str, float], Basis | None]:
    """Seconds by temperature, by the rates that `awareness doctor` measured of this machine, or by
    those of the reference machine; none for a memory that no map realigns."""
    source, target, size = check.memory.source.shape, check.target.shape, check.memory.bytes
    unmapped = check.verdict is not None and not check.exact and check.entry is None
    if source is None or target is None or size is None or unmapped:
        return {}, None
    wmatrix: MapSize | WMatrixManifest | None = check.entry.manifest if check.entry else None
    if check.entry and check.memory.latent:
        wmatrix = decoding(check.entry.manifest)
    rates, what = saved(), ""
    if check.verdict is None:
        wmatrix = typical_map(source, target)
        what = "a typical map between published architectures, by "
    times = load_times_s(
        target,
        check.tokens,
        check.config,
        rates or REFERENCE,
        package_bytes=size,
        wmatrix=wmatrix,
    )
    if rates is None:
        what += f"the rates of another machine ({REFERENCE.hardware}): run `awareness doctor` once"
        return times, Basis(kind="prior", source=what)
    what += f"this machine's rates, measured {rates.measured:%Y-%m-%d}"
    return times, Basis(kind="measured" if check.verdict else "prior", source=what)


def conditions(check: CheckContext) -> dict[str, dict[str, float]]:
    """The five arms: on the memory itself where it was measured, else the certificate's."""
    if check.self_test is not None:
        return {name: {"nll": nll} for name, nll in check.self_test.conditions.items()}
    return check.certificate.texts if check.certificate and not check.exact else {}


def curves(certificate: Certificate) -> tuple[Curve, ...]:
    """Retention of one memory by length: the map alone, with its shortest measured tail, and, where
    it was measured, with the passages re-read too that a server re-reads by default."""
    lengths = sorted({plan.context for plan in certificate.plans})
    tails = [(tail, 0) for tail in sorted({plan.tail for plan in certificate.plans})[:2]]
    reread = max(plan.reread for plan in certificate.plans if plan.reread <= BUDGET)
    return tuple(
        Curve(
            tail=tail,
            reread=count,
            contexts=tuple(lengths),
            retention=tuple(at_tail(certificate, n, tail, None, count) for n in lengths),
        )
        for tail, count in [*tails, *([(tails[-1][0], reread)] if reread else [])]
    )


def shares(check: CheckContext) -> tuple[Share, ...]:
    """The measured shares of a naive conversion's loss, by the divergence from native predictions,
    which needs fewer texts than the likelihood of the tokens."""
    return check.degradation.shares(check.tokens, "kl") if check.degradation else ()
