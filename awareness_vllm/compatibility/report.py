"""The report of a memory on a target, with the basis of each figure.

Score, level and recommendation are those of the published interface. A *prior* is a figure that was
published for models whose weights cannot be had: it is shown, and decides nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from awareness_vllm.schema import FrozenModel
from awareness_vllm.trust.policy import Signers
from awareness_vllm.wmatrix.certificate import Interval

Impact = Literal["low", "medium", "high"]
Level = Literal["Excellent", "Good", "Acceptable", "Marginal", "Poor"]

LEVELS: tuple[tuple[float, Level, str], ...] = (
    (0.95, "Excellent", "Proceed with confidence"),
    (0.90, "Good", "Recommended"),
    (0.85, "Acceptable", "Proceed with awareness"),
    (0.80, "Marginal", "Consider alternatives"),
    (-float("inf"), "Poor", "Not recommended"),
)
"""Lowest score of a level, its name and the recommendation, as published."""

COPIED = Interval(mean=1, ci_low=1, ci_high=1)
"""The retention of a model's own memory."""
REMAINDER = "remainder"
"""The share of a loss that is left with all constraints lifted."""


BasisKind = Literal["exact", "measured", "extrapolated", "claimed", "prior"]


class Basis(FrozenModel):
    """The origin of a figure.

    "exact": computed, as for a copy of a model's own states, or from a geometry. "measured": by the
    certificate of the W-Matrix file `digest`, here on the package of that digest, or of this
    machine. "extrapolated": by such a certificate, but of a memory longer than all that were
    measured, by their trend, or of states that are rounded more than the measured ones.
    "claimed": by such a certificate that no trusted key signed, where there is a trust file, or
    where a registry only lists it. "prior": published in `source`, or of another machine; not
    measured here.
    """

    kind: BasisKind
    source: str
    digest: str | None = None


class RiskFactor(FrozenModel):
    """A reason why the memory may be worth less than the estimate says, or unusable."""

    description: str
    impact: Impact


class Action(FrozenModel):
    """A way to raise retention, with its gain (None: unknown) and the gain's basis."""

    description: str
    gain: float | None
    basis: Literal["measured", "estimated"]


class Share(FrozenModel):
    """One source of degradation: its share of what a naive conversion loses, negative where lifting
    that constraint does harm, beside the published one (a prior). The REMAINDER, which no
    constraint explains, has none; with it the shares add up to 1."""

    source: str
    share: Interval
    prior: float | None


class Curve(FrozenModel):
    """Retention by tokens of context, of the map with `tail` tokens read natively and up to
    `reread` re-read in place."""

    tail: int
    reread: int = 0
    contexts: tuple[int, ...]
    retention: tuple[Interval, ...]


class CompatibilityReport(FrozenModel):
    """A memory on a target. Unknown figures are None; a figure has the basis beside it, or else the
    report's.

    `estimated_retention` lies within `ci_low` … `ci_high` for 95 % of memories like this one where
    its basis is measured. `refusal` is the error with which a server refuses the memory: its score
    is 0 then, and nothing is estimated. `head_mapping_quality` is the overlap of the attention
    distributions with native ones, 0 to 1, as a prior what the published share of head mapping in
    the loss leaves; `positional_compatibility` what the conversion of positions leaves, 0 to 1.
    `target_memory_gb` are 1e9 bytes of KV cache, an upper bound by a published architecture.
    `estimated_load_time_s` is that of a cold load; `load_times_s` has all temperatures, where
    `awareness doctor` measured this machine. `margin` is the certified retention above the best of
    the `controls`, what the same operations buy without a memory; None where no control was
    measured. `facts` is fact recall as a share of native, `facts_margin` that above its best
    control, `on_itself` the retention measured on the memory's own last quarter. `signed_by` are
    the trusted keys that signed package, W-Matrix and certificate.
    """

    memory: str
    source: str
    target: str
    tokens: int
    compatibility_score: float | None
    estimated_retention: float | None
    ci_low: float | None
    ci_high: float | None
    basis: Basis | None
    level: Level | None
    recommendation: str
    refusal: str | None = None
    signed_by: Signers = Signers()
    margin: Interval | None = None
    controls: dict[str, Interval] = Field(default_factory=dict)
    facts: Interval | None = None
    facts_margin: Interval | None = None
    on_itself: Interval | None = None
    head_mapping_quality: float | None
    head_mapping_basis: Basis | None = None
    positional_compatibility: float | None
    positional_basis: Basis | None
    target_memory_gb: float | None
    target_memory_basis: Basis | None = None
    estimated_load_time_s: float | None
    load_time_basis: Basis | None = None
    load_times_s: dict[str, float] = Field(default_factory=dict)
    risk_factors: tuple[RiskFactor, ...] = ()
    actions: tuple[Action, ...] = ()
    conditions: dict[str, dict[str, float]] = Field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    kinds: dict[str, Interval] = Field(default_factory=dict)
    degradation: tuple[Share, ...] = ()

    @property
    def confidence_interval(self) -> tuple[float, float] | None:
        """`ci_low` and `ci_high`."""
        return None if self.ci_low is None or self.ci_high is None else (self.ci_low, self.ci_high)


class Estimate(FrozenModel):
    """What a W-Matrix keeps in general: the published fields of `CompatibilityChecker`.

    `alignment_quality` is the mean cosine of aligned states to the target's own, as a prior 1 less
    the published reconstruction error; `dimensional_loss` what a round trip through the map loses,
    `structural_mismatch` how far the two geometries are apart; all 0 to 1, None where unknown.
    """

    source: str
    target: str
    retention: float | None
    ci_low: float | None
    ci_high: float | None
    basis: Basis | None
    alignment_quality: float | None
    dimensional_loss: float | None
    structural_mismatch: float | None
    risk_level: Literal["Low", "Medium", "High"]
    recommendation: str


class Cell(FrozenModel):
    """One pair of models in the compatibility matrix; unknown where `basis` is None. `signed_by` is
    the name of the trusted key that signed the certificate."""

    source: str
    target: str
    retention: Interval | None
    basis: Basis | None
    signed_by: str | None = None


class Matrix(FrozenModel):
    """Every source with every target: measured and published retentions."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    cells: tuple[Cell, ...]

    def cell(self, source: str, target: str) -> Cell | None:
        """The best known cell of a pair: measured before published, published before nothing."""
        cells = [c for c in self.cells if (c.source, c.target) == (source, target)]
        order = ("exact", "measured", "extrapolated", "claimed", "prior", None)
        return min(cells, key=lambda c: order.index(c.basis and c.basis.kind), default=None)


def level_of(score: float | None) -> tuple[Level | None, str]:
    """The published level of a score, and its recommendation."""
    if score is None:
        return None, "Unknown: certify a W-Matrix, or check with --measure"
    return next((name, advice) for least, name, advice in LEVELS if score > least)
