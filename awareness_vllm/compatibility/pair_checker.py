"""`CompatibilityChecker`: what a W-Matrix keeps in general between two models, before anything is
loaded: by its certificate; without one, by published figures, which are labelled as priors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from awareness_vllm.compatibility.mismatch import structural_mismatch
from awareness_vllm.compatibility.models import Listing, Model, model
from awareness_vllm.compatibility.priors import (
    COLUMN,
    find_name,
    published_error,
    published_retention,
    published_vectors,
)
from awareness_vllm.compatibility.report import COPIED, Basis, BasisKind, Estimate, level_of
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import BadInput
from awareness_vllm.marketplace.maps import entry_of, with_repository
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.trust.policy import TrustPolicy
from awareness_vllm.wmatrix.certificate import TIERS, Certificate, Interval
from awareness_vllm.wmatrix.listing import WMatrixListing
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry
from awareness_vllm.wmatrix.verdict import verdict

Risk = Literal["Low", "Medium", "High"]
Known = tuple[Interval, Basis]


class CompatibilityChecker:
    """Estimates what is kept between two models.

        estimate = CompatibilityChecker().estimate(
            vector_listing=listing,
            target_model="llama-3.1-70b",
            target_config={"quantization": "fp16", "context_length": 128000},
        )
        print(f"{estimate.retention:.1%} ({estimate.ci_low:.1%} - {estimate.ci_high:.1%})")
        print(f"{estimate.alignment_quality:.3f}", estimate.risk_level, estimate.recommendation)

    Args:
        wmatrices: a registry, or files and folders, by default `$AWARENESS_HOME/wmatrices`.
        registry: where maps are looked for that are not among them, as of
            `MemoryCompatibilityChecker`.

    Raises:
        BadInput: a registry that cannot be used.
    """

    def __init__(
        self,
        wmatrices: Registry | Sequence[str | Path] | None = None,
        *,
        registry: str | Path | None = None,
    ) -> None:
        self.registry = with_repository(wmatrices, registry, TrustPolicy())

    def estimate(
        self,
        vector_listing: Listing | None = None,
        target_model: str | Path | None = None,
        target_config: Mapping[str, Any] | None = None,
        *,
        source_model: str | Path | None = None,
    ) -> Estimate:
        """The estimate for a model, or that of a listing, to another.

        Models are given by folder, by their name in the W-Matrices, or by a published name. The
        certificate of the pair's first map says what it keeps alone; without one, published figures
        are returned as a prior: of memories, or of vectors where a listing of one is given.

        Args:
            vector_listing: anything with `source_model`, instead of `source_model`. A memory's
                listing of `Marketplace` says which model that is exactly. That of a W-Matrix is
                estimated itself; its target need not be given.
            target_config: fields of `TargetConfig`. They are checked; a general figure is the map
                alone's at the protocol's length, which they do not change.

        Raises:
            BadInput: an unknown name, or one that several models have; a source or target missing,
                or not the map's; a configuration that contradicts itself or the target.
            UnsupportedModel: the folder of a model that cannot be used.
            RegistryError: the registry cannot be asked for a map.
        """
        listing = vector_listing
        if isinstance(listing, WMatrixListing) and source_model is None:
            return self._of_map(listing, target_model, TargetConfig.read(target_config))
        if (listing is None) == (source_model is None) or target_model is None:
            raise BadInput(
                "an estimate is of one source and one target",
                found=f"vector_listing={listing!r}, source_model={source_model!r}, "
                f"target_model={target_model!r}"[:300],
                expected="target_model, and either vector_listing or source_model",
            )
        target = model(target_model, self.registry)
        if isinstance(listing, PackageListing):
            source = Model(listing.source_model, listing.manifest.geometry)
        else:
            name = source_model if listing is None else listing.source_model
            assert name is not None
            source = model(name, self.registry)
        config = TargetConfig.read(target_config)
        entry = None
        if target.geometry is not None:
            config.check(target.geometry)
        if source.geometry is not None and target.geometry is not None:
            decided = verdict(source.name, source.geometry, target.geometry, self.registry)
            if decided.exact:
                return _exact(source, target)
            entry = decided.entry
        if entry is not None and entry.certificate is not None:
            return _certified(source, target, entry, entry.certificate)
        vectors = listing is not None and not isinstance(listing, PackageListing)
        return _uncertified(source, target, entry, _published(source, target, vectors=vectors))

    def _of_map(
        self, listing: WMatrixListing, target_model: str | Path | None, config: TargetConfig
    ) -> Estimate:
        """The estimate of a map that is listed."""
        entry = entry_of(listing)
        ends = entry.manifest.source, entry.manifest.target
        source, target = (Model(end.name, end) for end in ends)
        if target_model not in (None, target.name):
            asked = model(str(target_model), self.registry)
            if asked.geometry is None or not asked.geometry.same_model(ends[1]):
                raise BadInput(
                    "the W-Matrix leads to another model",
                    found=target.name,
                    expected=asked.name,
                    remedy="look for one with market.wmatrices.search(target_model=…)",
                )
        config.check(ends[1])
        if entry.certificate is not None:
            return _certified(source, target, entry, entry.certificate)
        return _uncertified(source, target, entry, None)


def _exact(source: Model, target: Model) -> Estimate:
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
    retention, facts, metrics = certificate.retention, certificate.facts.mean, certificate.metrics
    risks: dict[int | None, Risk] = {} if entry.claimed else {1: "Low", 2: "Medium"}
    kind: BasisKind = "claimed" if entry.claimed else "measured"
    return _estimate(
        source,
        target,
        (retention, Basis(kind=kind, source=str(entry), digest=entry.digest)),
        # The mean cosine over layers; of states that point away nothing is left.
        alignment_quality=max(0.0, fmean(metrics.semantic_preservation)) if metrics else None,
        dimensional_loss=_loss(entry),
        # The tier counts recalled facts, whose loss retention alone hides.
        risk=risks.get(certificate.tier, "High"),
        recommendation=f"{level_of(retention.mean)[1]}; facts are recalled {facts:.2f} times as "
        "often as by reading the text",
    )


def _uncertified(
    source: Model, target: Model, entry: WMatrixEntry | None, prior: Known | None
) -> Estimate:
    recommendation, error = f"Unknown: {_remedy(source, target, entry)}", None
    risk: Risk = "High"
    if prior is not None:
        retention = prior[0].mean
        error = published_error(retention)
        # At best medium: a published figure does not count facts, and was not measured here.
        risk = "High" if retention < TIERS[1][0] else "Medium"
        recommendation = (
            f"{level_of(retention)[1]}, by published figures that were not measured here: "
            f"{_remedy(source, target, entry)}"
        )
    return _estimate(
        source,
        target,
        prior,
        alignment_quality=None if error is None else 1 - error,
        dimensional_loss=error if entry is None else _loss(entry),
        risk=risk,
        recommendation=recommendation,
    )


def _estimate(
    source: Model,
    target: Model,
    known: Known | None,
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


def _published(source: Model, target: Model, *, vectors: bool) -> Known | None:
    names = find_name(source.name), find_name(target.name)
    if names[0] is None or names[1] is None:
        return None
    if vectors:
        return published_vectors(names[0], names[1])
    return published_retention(names[0], names[1], COLUMN)


def _mismatch(source: Model, target: Model) -> float | None:
    if source.geometry is None or target.geometry is None:
        return None
    return structural_mismatch(source.geometry, target.geometry)


def _loss(entry: WMatrixEntry) -> float | None:
    """The manifest's reconstruction error, at most 1."""
    error = entry.manifest.reconstruction_error
    return None if error is None else min(max(error, 0.0), 1.0)


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
        "`awareness certify`, or look for a route through other models with `awareness path`"
    )
