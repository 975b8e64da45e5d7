"""`CompatibilityChecker`: what a W-Matrix keeps in general between two models, before anything is
loaded. Its certificate says so; where there is none, published figures are shown as what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from awareness_vllm.compatibility.mismatch import mean, structural_mismatch
from awareness_vllm.compatibility.models import Model, model
from awareness_vllm.compatibility.priors import (
    COLUMN,
    find_name,
    published_retention,
    published_vectors,
)
from awareness_vllm.compatibility.report import COPIED, Basis, Estimate, level_of
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import BadInput
from awareness_vllm.wmatrix.certificate import TIERS, Certificate, Interval
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry
from awareness_vllm.wmatrix.verdict import Verdict, verdict

Risk = Literal["Low", "Medium", "High"]


class Listing(Protocol):
    """Whatever is offered, if it says which model it comes from."""

    @property
    def source_model(self) -> str: ...


class CompatibilityChecker:
    """Estimates what is kept between two models.

    Args:
        wmatrices: a registry, or files and folders, by default `$AWARENESS_HOME/wmatrices`.
    """

    def __init__(self, wmatrices: Registry | Sequence[str | Path] | None = None) -> None:
        self.registry = Registry.read(wmatrices)

    def estimate(
        self,
        vector_listing: Listing | None = None,
        target_model: str | Path | None = None,
        target_config: Mapping[str, Any] | None = None,
        *,
        source_model: str | Path | None = None,
    ) -> Estimate:
        """What is kept from a model, or from a listing's, to another.

        Models are given by folder, by the name that W-Matrices know them by, or by a published
        name. The best certified W-Matrix of the pair says what the map alone keeps; where there is
        none, what was published is returned as a prior: of memories, or of vectors where a
        listing of one was given.

        Args:
            target_config: fields of `TargetConfig`. They are checked; a general figure is the map
                alone's at the protocol's length, which nothing in them changes.

        Raises:
            BadInput: a name that nobody knows, or several models have; a source or target missing;
                a configuration that contradicts itself or the target.
            UnsupportedModel: the folder of a model that cannot be used.
        """
        if (vector_listing is None) == (source_model is None) or target_model is None:
            raise BadInput(
                "an estimate is of one source and one target",
                found=f"vector_listing={vector_listing!r}, source_model={source_model!r}, "
                f"target_model={target_model!r}",
                expected="target_model, and either vector_listing or source_model",
            )
        given = vector_listing.source_model if vector_listing is not None else source_model
        assert given is not None
        source, target = model(given, self.registry), model(target_model, self.registry)
        config = TargetConfig.read(target_config)
        if target.geometry is not None:
            config.check(target.geometry)
        found = _verdict(self.registry, source, target)
        if found is not None and found.exact:
            return _copy(source, target)
        entry = found.entry if found else None
        if entry is not None and entry.certificate is not None:
            return _certified(source, target, entry, entry.certificate)
        published = _published(source, target, vectors=vector_listing is not None)
        return _uncertified(source, target, entry, published)


def _verdict(registry: Registry, source: Model, target: Model) -> Verdict | None:
    if source.geometry is None or target.geometry is None:
        return None
    return verdict(source.name, source.geometry, target.geometry, registry)


def _copy(source: Model, target: Model) -> Estimate:
    return _estimate(
        source,
        target,
        (COPIED, Basis(kind="exact", source="the same model: its states are copied")),
        alignment_quality=1.0,
        dimensional_loss=0.0,
        risk="Low",
        recommendation=level_of(COPIED.mean)[1],
    )


def _certified(
    source: Model, target: Model, entry: WMatrixEntry, certificate: Certificate
) -> Estimate:
    kept, facts = certificate.retention, certificate.facts.mean
    basis = Basis(kind="measured", source=str(entry), digest=entry.digest)
    return _estimate(
        source,
        target,
        (kept, basis),
        alignment_quality=_quality(certificate),
        dimensional_loss=_loss(entry),
        risk=_risk_of_tier(certificate.tier),
        recommendation=f"{level_of(kept.mean)[1]}; facts are recalled {facts:.2f} times as often "
        "as by reading the text",
    )


def _uncertified(
    source: Model,
    target: Model,
    entry: WMatrixEntry | None,
    published: tuple[Interval, Basis] | None,
) -> Estimate:
    remedy = _remedy(source, target, entry)
    if published is None:
        recommendation = f"Nobody knows: {remedy}"
    else:
        says = level_of(published[0].mean)[1]
        recommendation = f"{says}, going by published figures that nobody here measured: {remedy}"
    return _estimate(
        source,
        target,
        published,
        alignment_quality=None,
        dimensional_loss=None if entry is None else _loss(entry),
        risk=_risk_of_prior(published),
        recommendation=recommendation,
    )


def _estimate(
    source: Model,
    target: Model,
    known: tuple[Interval, Basis] | None,
    *,
    alignment_quality: float | None,
    dimensional_loss: float | None,
    risk: Risk,
    recommendation: str,
) -> Estimate:
    interval, basis = known or (None, None)
    return Estimate(
        source=source.name,
        target=target.name,
        retention=interval.mean if interval else None,
        ci_low=interval.ci_low if interval else None,
        ci_high=interval.ci_high if interval else None,
        basis=basis,
        alignment_quality=alignment_quality,
        dimensional_loss=dimensional_loss,
        structural_mismatch=_mismatch(source, target),
        risk_level=risk,
        recommendation=recommendation,
    )


def _published(source: Model, target: Model, *, vectors: bool) -> tuple[Interval, Basis] | None:
    ends = find_name(source.name), find_name(target.name)
    if ends[0] is None or ends[1] is None:
        return None
    if vectors:
        return published_vectors(ends[0], ends[1])
    return published_retention(ends[0], ends[1], COLUMN)


def _mismatch(source: Model, target: Model) -> float | None:
    if source.geometry is None or target.geometry is None:
        return None
    return structural_mismatch(source.geometry, target.geometry)


def _quality(certificate: Certificate) -> float | None:
    """The mean cosine over layers; a map whose states point away has none of it."""
    if certificate.metrics is None:
        return None
    return max(0.0, mean(list(certificate.metrics.semantic_preservation)))


def _loss(entry: WMatrixEntry) -> float | None:
    """The manifest's reconstruction error: what is lost beyond all that there was is all of it."""
    found = entry.manifest.reconstruction_error
    return None if found is None else min(max(found, 0.0), 1.0)


def _risk_of_tier(tier: int | None) -> Risk:
    """The tier counts recalled facts, whose loss retention alone hides."""
    risks: dict[int | None, Risk] = {1: "Low", 2: "Medium"}
    return risks.get(tier, "High")


def _risk_of_prior(published: tuple[Interval, Basis] | None) -> Risk:
    """At best medium: a published figure says nothing of facts, and nobody here measured it."""
    if published is None or published[0].mean < TIERS[1][0]:
        return "High"
    return "Medium"


def _remedy(source: Model, target: Model, entry: WMatrixEntry | None) -> str:
    """What would make the pair's figure a measured one."""
    if entry is not None:
        return f"measure the map with `awareness certify {entry.path.name}`"
    if missing := [m.name for m in (source, target) if m.geometry is None]:
        return (
            f"to measure it, give the folder of {' and of '.join(missing)}, fit a map with "
            "`awareness fit`, and certify it with `awareness certify`"
        )
    return (
        f"fit a map with `awareness fit` from {source.name} to {target.name} and certify it with "
        "`awareness certify`, or look for a way through other models with `awareness path`"
    )
