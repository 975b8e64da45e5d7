"""The certificate of a W-Matrix: measured figures, and the protocol and texts behind them."""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationError, model_validator

from awareness_vllm.errors import escaped
from awareness_vllm.schema import MAX_NAME, FrozenModel, PlainName, PlainText

TIERS = ((0.90, 0.85), (0.82, 0.60), (0.75, 0.30), (0.60, 0.0))
"""Minimum retention and fact recall of tiers 1 to 4. The retentions are the lower ends of the
published ranges; the recalls are ours: retention alone hides the loss of facts."""
TAIL = 16
"""Default number of a memory's last tokens that the target reads natively, after the aligned rest:
the question follows them at once, and no other use of the same cost adds as much retention
(docs/fidelity-log.md). A longer tail adds more, and takes longer (`awareness serve --tail`)."""
CONTROLS = ("truncation", "quotes", "half", "passages")
"""What the operations of a plan buy without a memory, read natively after the sink: the last tokens
of the text; the passages that match the question, in order; half of either; and, for less, just the
passages that the plan re-reads."""
LENGTH_TEXTS = 16
"""Texts at each further length of context: one long text costs as much as many short ones."""


class Interval(FrozenModel):
    """A measured figure with its 95 % bootstrap interval over documents."""

    mean: FiniteFloat
    ci_low: FiniteFloat
    ci_high: FiniteFloat


def _at_most(most: float) -> Callable[[Interval], Interval]:
    def check(interval: Interval) -> Interval:
        figures = (interval.mean, interval.ci_low, interval.ci_high)
        if interval.ci_low > interval.ci_high:
            raise ValueError("an interval that ends before it begins")
        if interval.mean > most or max(map(abs, figures)) > FURTHEST:
            raise ValueError(f"a figure beyond {most:g}, or further than {FURTHEST:g} from zero")
        return interval

    return check


TOLERANCE = 1e-6
"""Of a margin, for the rounding of its computation."""
FURTHEST = 1e4
"""What no figure exceeds, either way: a share of almost nothing can be far below zero."""
Retention = Annotated[Interval, AfterValidator(_at_most(1.5))]
"""Nothing keeps half as much again as there is: on so few or so easy texts nothing was measured."""
Recall = Annotated[Interval, AfterValidator(_at_most(10.0))]
"""Facts as a share of those recalled natively, which may be few."""
Difference = Annotated[Interval, AfterValidator(_at_most(FURTHEST))]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Cosine = Annotated[float, Field(ge=-1.001, le=1.001, allow_inf_nan=False)]
"""A cosine, or an overlap, with the rounding of its computation."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Control = Literal["truncation", "quotes", "half", "passages"]
Text = Annotated[PlainText, Field(max_length=MAX_NAME)]
Figures = dict[PlainName, dict[PlainName, FiniteFloat]]


class Protocol(FrozenModel):
    """What was measured on, and how. `texts` and `cases` are digests; `limit` documents of them
    were taken evenly; `context` tokens of memory, `continuation` tokens scored after it."""

    texts: Text
    cases: Text
    limit: Count
    context: Count = Field(ge=1)
    continuation: Count
    sources: tuple[PlainText, ...] = ()
    """The folders and files that the texts came from; version 0.1 did not record them."""


class Plan(FrozenModel):
    """The measured figures of a memory of `context` tokens that is mapped but for its last `tail`
    tokens, which are read natively, and for up to `reread` tokens of passages that the question
    points at, which are re-read in place.

    `cost` is a share of the floating point operations of reading the whole context natively;
    `kinds` is the retention by the texts' folder, `tokens_only` the retention of the same plan
    with the source's states masked. `controls` is the retention of what the same operations buy
    without a memory, by the names in CONTROLS; `margin` is the plan's retention less that of the
    best of them, None where no control was measured (version 0.1).

    `facts` is fact recall as a share of native, None where not measured; `facts_native` the share
    of the cases that the native arm recalls; `facts_controls` and `facts_margin` as `controls` and
    `margin`, of `facts`; `facts_quoted` and its margin those of the same passages quoted before the
    question instead, as a server does by default; `facts_kinds` the exact matches of each arm by
    kind of case. `texts` and `cases` are how many were measured, 0 where that was not recorded.
    """

    context: Count = Field(ge=1)
    tail: Count
    reread: Count = 0
    cost: float = Field(ge=0, le=FURTHEST, allow_inf_nan=False)
    retention: Retention
    kinds: dict[PlainName, Difference]
    top1: Share
    tokens_only: Difference
    controls: dict[Control, Difference] = Field(default_factory=dict)
    margin: Difference | None = None
    facts: Recall | None = None
    facts_native: Share | None = None
    facts_controls: dict[Control, Recall] = Field(default_factory=dict)
    facts_margin: Difference | None = None
    facts_quoted: Recall | None = None
    facts_quoted_margin: Difference | None = None
    facts_kinds: dict[PlainName, dict[PlainName, Share]] = Field(default_factory=dict)
    texts: Count = 0
    cases: Count = 0

    @model_validator(mode="after")
    def _agrees_with_its_controls(self) -> Plan:
        """Check that each margin is the difference that its figures have."""
        quoted = self.facts_controls if self.facts_quoted else {}
        for kept, controls, margin in (
            (self.retention, self.controls, self.margin),
            (self.facts, self.facts_controls, self.facts_margin),
            (self.facts_quoted, quoted, self.facts_quoted_margin),
        ):
            if (margin is None) != (not controls) or (controls and kept is None):
                raise ValueError("a margin without controls, or controls without one")
            if margin is not None and kept is not None:
                best = max(control.mean for control in controls.values())
                if abs(kept.mean - best - margin.mean) > TOLERANCE:
                    raise ValueError("a margin that its controls contradict")
        return self

    @property
    def beaten(self) -> bool:
        """Whether what the same cost buys without a memory was measured to keep as much or more: a
        plan that is never chosen, and that promises nothing."""
        return self.margin is not None and self.margin.mean <= 0


class Metrics(FrozenModel):
    """The published alignment metrics, as means over `n` texts.

    `semantic_preservation` [layers] is the cosine of a token's aligned keys and values to the
    target's own; `attention_fidelity` [layers] the overlap of the attention distributions, from 0
    to 1; `gradient_ratio` the norm of the loss's gradient in the memory's states as a share of
    native, `gradient_stability` whether it is within a factor of ten for every text.
    """

    semantic_preservation: tuple[Cosine, ...] = Field(min_length=1)
    attention_fidelity: tuple[Cosine, ...] = Field(min_length=1)
    gradient_ratio: FiniteFloat
    gradient_stability: bool
    n: Count


def _of_the_map_alone(plans: tuple[Plan, ...]) -> tuple[Plan, ...]:
    """Check that each length was measured with nothing read natively, too: so a server may be
    set."""
    shapes = defaultdict(set)
    for plan in plans:
        shapes[plan.context].add((plan.tail, plan.reread))
    if lacking := [context for context, measured in shapes.items() if (0, 0) not in measured]:
        raise ValueError(f"no plan of the map alone for {lacking[:4]} tokens")
    return plans


def _of_texts(counts: dict[str, int]) -> dict[str, int]:
    if not counts.get("texts") or counts.keys() - {"texts", "cases"}:
        raise ValueError("counts of no text, or of other things than texts and cases")
    return counts


class Certificate(FrozenModel):
    """The five arms' figures and what follows from them.

    `margin` is the gain by the source's states over the text alone: NLL of the tokens-only arm
    minus the memory arm's, in nats. `facts` is fact recall as a share of native, also by kind of
    fact and by tokens between fact and question; `facts_margin` is the memory arm's exact match
    minus the tokens-only arm's. `retention` and `facts` are those of the map alone, without a
    tail; `plans` are sorted by length of context, then by cost. `metrics` are None for a map that
    reads no tokens: its rows do not correspond to the target's tokens.
    """

    protocol: Protocol
    texts: Figures
    cases: Figures
    metrics: Metrics | None
    retention: Retention
    margin: Difference
    plans: Annotated[tuple[Plan, ...], Field(min_length=1), AfterValidator(_of_the_map_alone)]
    facts: Recall
    facts_kinds: dict[PlainName, Recall]
    facts_distances: dict[PlainName, Recall]
    facts_margin: Difference
    counts: Annotated[dict[str, Count], AfterValidator(_of_texts)]
    tier: int | None = Field(ge=1, le=len(TIERS))
    measured: datetime.date
    hardware: Text
    versions: dict[PlainName, PlainName]


def parse_certificate(document: object) -> Certificate | None:
    """The certificate in a manifest; None without one, and for an incomplete one (an older
    version's, or published figures alone), which certifies nothing.

    Raises:
        ValueError: figures that no measurement gives.
    """
    try:
        return Certificate.model_validate(document)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
    if document is None or {"missing", "extra_forbidden"} & {fault["type"] for fault in faults}:
        return None
    where = ".".join(map(str, faults[0]["loc"]))
    raise ValueError(escaped(f"{where}: {faults[0]['msg']}")[:200])


def statement(document: Mapping[str, Any], payload: str) -> bytes:
    """What is signed by who measured a certificate: canonical JSON of it and of the map's payload.

    The signature of the file is another one: whoever publishes a map need not be who measured it.
    The payload is a digest of the map's tensors and manifest, the certificate included, and each
    load computes it anew. So a certificate that was copied into another map, or changed in its own,
    is signed by nobody.

    Args:
        document: the certificate, as it is in the manifest.
        payload: the manifest's, in hex.
    """
    fields = {"type": "awareness-certificate/1", "payload": payload, "certificate": document}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def tier(retention: float, facts: float) -> int | None:
    """The tier, from 1 (excellent) to 4 (marginal); None below all of them."""
    for number, (minimum, minimum_facts) in enumerate(TIERS, 1):
        if retention >= minimum and facts >= minimum_facts:
            return number
    return None
