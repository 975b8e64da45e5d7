"""The certification of a W-Matrix: the five arms on held-out texts and facts."""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from awareness_vllm.anchors.corpus import Document, digest, sources
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.arms import PlanShape
from awareness_vllm.evaluate.bootstrap import mean
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import (
    Case,
    CaseFigures,
    TextFigures,
    evaluate_cases,
    evaluate_texts,
    join_documents,
    take_excerpts,
)
from awareness_vllm.evaluate.flops import map_flop, plan_cost
from awareness_vllm.evaluate.metrics import alignment_metrics
from awareness_vllm.passages import BUDGET
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.certificate import (
    CONTROLS,
    LENGTH_TEXTS,
    TAIL,
    Certificate,
    Interval,
    Metrics,
    Plan,
    Protocol,
    tier,
)
from awareness_vllm.wmatrix.file import WMatrix

TEXTS, CASES = 48, 200
"""Texts at the protocol's own length, and cases at each length, of the full protocol."""
NEAR = 1.5
"""The factor within which a case's tokens count as a measured length."""
REREADS = (0, BUDGET)
"""Tokens that the measured plans re-read, at most: none, and a server's default."""
FACT_TAILS = (0, TAIL)
"""Tails of the plans whose fact recall is measured: longer ones recall no more of what stands
anywhere (docs/fidelity-log.md)."""
TAIL_SHARES = (0.16,)
"""Tails of the measured plans as shares of the context, beside none and a server's default: with
the map about a quarter of the prefill. Dearer plans are not measured."""
TAIL_STEP = 16
"""Tokens of a block of vLLM's cache, of which tails are multiples."""
DISTANCES = (0, 64, 128)
"""Lower ends, in tokens, of the ranges of distance by which recall is reported."""
METRIC_TEXTS, SERVED_METRIC_TEXTS = 6, 3
"""Texts for the alignment metrics, sampled evenly; and where only served plans are measured."""


@dataclass(frozen=True)
class Extent:
    """How much a certification measures: of the plans all, or those alone that are `served` by
    default; and the times, by `time.monotonic`, after which no texts and no cases are begun."""

    served: bool = False
    texts: float | None = None
    cases: float | None = None


WHOLE = Extent()


def certify(
    wmatrix: WMatrix,
    source: str | Path,
    target: str | Path,
    texts: Sequence[Document],
    cases: Sequence[Case],
    *,
    limit: int | None = None,
    context: int = 300,
    continuation: int = 60,
    lengths: Sequence[int] = (),
    device: str = "cpu",
    progress: bool = True,
    extent: Extent = WHOLE,
) -> WMatrix:
    """The W-Matrix with a certificate of its measured figures.

    Args:
        texts, cases: from sources that no anchor came from. A case with `tokens` is measured at the
            length that it is nearest to, others at `context`.
        limit: the most texts, and cases of each length, to measure on; by default TEXTS and CASES.
        lengths: tokens of further contexts to measure at; short texts are joined for them.
        device: as for `EvalHarness`.
        extent: what is left out, for want of time.

    Raises:
        BadInput: texts that measure nothing.
    """
    harness = EvalHarness(Path(source), Path(target), wmatrix, device)
    measured, most = sorted({context, *lengths}), limit or TEXTS
    figures = {
        length: measure_texts(
            harness,
            texts if length == context else join_documents(texts, length + continuation),
            length,
            continuation,
            most if length == context else min(most, LENGTH_TEXTS),
            extent,
            progress=progress,
        )
        for length in measured
    }
    recalled = {
        length: measure_cases(harness, group, length, limit or CASES, extent, progress=progress)
        for length, group in by_length(cases, measured, context).items()
    }
    metrics = measure_metrics(harness, texts, context, continuation, extent)
    protocol = protocol_of(texts, cases, most, context, continuation)
    with plausible():
        plans = build_plans(harness, wmatrix, figures, recalled, extent)
        certificate = build_certificate(
            protocol, figures[context], recalled[context], metrics, plans
        )
    update = {"certificate": certificate.model_dump(mode="json")}
    return replace(wmatrix, manifest=wmatrix.manifest.model_copy(update=update))


def protocol_of(
    texts: Sequence[Document], cases: Sequence[Case], limit: int, context: int, continuation: int
) -> Protocol:
    """What is measured on, and how."""
    return Protocol(
        texts=digest(texts),
        cases=digest(Document(c["question"] + c["answer"], c["context"]) for c in cases),
        limit=limit,
        context=context,
        continuation=continuation,
        sources=sources(texts),
    )


def measure_texts(
    harness: EvalHarness,
    texts: Sequence[Document],
    context: int,
    continuation: int,
    limit: int,
    extent: Extent = WHOLE,
    *,
    progress: bool,
) -> TextFigures:
    """Figures of all plans and their controls at one length of context."""
    assert harness.wmatrix is not None
    return evaluate_texts(
        harness,
        texts,
        context=context,
        continuation=continuation,
        limit=limit,
        shapes=plan_shapes(harness.wmatrix, context, extent),
        controls=controls_of(harness.wmatrix),
        progress=progress,
        until=extent.texts,
    )


def measure_cases(
    harness: EvalHarness,
    cases: Sequence[Case],
    context: int,
    limit: int,
    extent: Extent = WHOLE,
    *,
    progress: bool,
) -> CaseFigures:
    """Fact recall of the plans with short tails and their controls at one length of context."""
    assert harness.wmatrix is not None
    return evaluate_cases(
        harness,
        cases,
        limit=limit,
        shapes=[s for s in plan_shapes(harness.wmatrix, context, extent) if s.tail in FACT_TAILS],
        controls=controls_of(harness.wmatrix),
        progress=progress,
        until=extent.cases,
    )


def measure_metrics(
    harness: EvalHarness,
    texts: Sequence[Document],
    context: int,
    continuation: int,
    extent: Extent = WHOLE,
) -> Metrics | None:
    """The alignment metrics, on fewer texts; None for a map that reads no tokens."""
    if harness.wmatrix is None or not harness.wmatrix.manifest.reads_tokens:
        return None
    count = SERVED_METRIC_TEXTS if extent.served else METRIC_TEXTS
    excerpts = take_excerpts(harness, texts, context, continuation, count)
    return alignment_metrics(harness, [(text, ids) for _, text, ids in excerpts])


def by_length(cases: Sequence[Case], lengths: Sequence[int], context: int) -> dict[int, list[Case]]:
    """Cases by the measured length that theirs is nearest to, within a factor of NEAR; those that
    do not say how long they are by `context`."""
    groups: dict[int, list[Case]] = {context: []}
    for case in cases:
        tokens = int(case.get("tokens", context))
        nearest = min(lengths, key=lambda length: abs(math.log(length / tokens)))
        if max(nearest / tokens, tokens / nearest) <= NEAR:
            groups.setdefault(nearest, []).append(case)
    return dict(sorted(groups.items()))


@contextlib.contextmanager
def plausible() -> Iterator[None]:
    """Turns figures that no certificate may have into BadInput."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(
            "nothing was measured",
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            expected="texts that the target predicts far better after their beginning than without",
            remedy="give more texts, or other ones",
        ) from error


def build_certificate(
    protocol: Protocol,
    texts: TextFigures,
    cases: CaseFigures,
    metrics: Metrics | None,
    plans: Sequence[Plan],
) -> Certificate:
    """The certificate of measured figures; `plans` in any order."""
    on_texts, on_cases = texts.summary(), cases.summary()
    facts = cases.recall()
    return Certificate(
        protocol=protocol,
        texts=on_texts["conditions"],
        cases=on_cases["conditions"],
        metrics=metrics,
        retention=on_texts["retention"],
        margin=mean(texts.nll("tokens_only") - texts.nll("memory")),
        plans=sorted(plans, key=lambda plan: (plan.context, plan.cost)),
        facts=facts,
        facts_kinds=recall_by(cases, cases.kinds),
        facts_distances=recall_by(cases, [distance_range(d) for d in cases.distances]),
        facts_margin=mean(cases.exact("memory") - cases.exact("tokens_only")),
        counts={"texts": on_texts["n"], "cases": on_cases["n"]},
        tier=tier(on_texts["retention"]["mean"], facts["mean"]),
        measured=datetime.date.today(),
        hardware=hardware(),
        versions=versions(),
    )


def plan_shapes(wmatrix: WMatrix, context: int, extent: Extent = WHOLE) -> list[PlanShape]:
    """The plans that are measured for a context of that length, that of the map alone first."""
    if not wmatrix.manifest.reads_tokens:
        return [PlanShape()]  # packages for it have no text to read natively
    if extent.served:
        return [PlanShape(), PlanShape(TAIL), PlanShape(TAIL, BUDGET)]
    shares = {round(share * context / TAIL_STEP) * TAIL_STEP for share in TAIL_SHARES}
    tails = sorted(tail for tail in {0, TAIL, *shares} if 0 <= tail < context)
    return [PlanShape(tail, reread) for tail in tails for reread in REREADS if reread < context]


def controls_of(wmatrix: WMatrix) -> Sequence[str]:
    """The controls of a map's plans: none without the text, which they read."""
    return CONTROLS if wmatrix.manifest.reads_tokens else ()


def build_plans(
    harness: EvalHarness,
    wmatrix: WMatrix,
    texts: Mapping[int, TextFigures],
    cases: Mapping[int, CaseFigures],
    extent: Extent = WHOLE,
) -> list[Plan]:
    """The plans of all shapes at all lengths of context, by figures at these lengths."""
    mapped, sink = map_flop(wmatrix), harness.sink()
    return [
        build_plan(
            length,
            shape,
            plan_cost(mapped, harness.prefill, length, shape.tail, shape.reread, sink),
            figures,
            cases.get(length),
        )
        for length, figures in texts.items()
        for shape in plan_shapes(wmatrix, length, extent)
    ]


def build_plan(
    context: int, shape: PlanShape, cost: float, texts: TextFigures, cases: CaseFigures | None
) -> Plan:
    """The plan of one shape at one length of context."""
    memory = shape.condition()
    kinds = rows_by([name.split("/")[0] for name in texts.names])
    controls = {name: c for name in CONTROLS if (c := shape.condition(name)) in texts.conditions}
    fields = fact_fields(shape, cases) if cases and memory in cases.conditions else {}
    if controls:
        fields |= {
            "controls": {name: texts.retention(c) for name, c in controls.items()},
            "margin": texts.margin(memory, list(controls.values())),
        }
    return Plan(
        context=context,
        tail=shape.tail,
        reread=shape.reread,
        cost=cost,
        retention=Interval(**texts.retention(memory)),
        kinds={kind: Interval(**texts.retention(memory, rows)) for kind, rows in kinds.items()},
        top1=texts.conditions[memory][:, 2].mean(),
        tokens_only=Interval(**texts.retention(shape.condition("tokens_only"))),
        texts=len(texts.names),
        **fields,
    )


def fact_fields(shape: PlanShape, cases: CaseFigures) -> dict[str, Any]:
    """A plan's figures of fact recall; no shares of native where it recalls nothing."""
    arms = {"native": "native", "memory": shape.condition()}
    arms |= {arm: shape.condition(arm) for arm in ("quoted", "tokens_only", *CONTROLS)}
    arms = {arm: condition for arm, condition in arms.items() if condition in cases.conditions}
    controls = {name: arms[name] for name in CONTROLS if name in arms}
    fields: dict[str, Any] = {
        "cases": len(cases.kinds),
        "facts_native": cases.exact("native").mean(),
        "facts_kinds": {
            kind: {arm: cases.exact(condition)[rows].mean() for arm, condition in arms.items()}
            for kind, rows in sorted(rows_by(cases.kinds).items())
        },
    }
    if not cases.exact("native").any():
        return fields
    fields["facts"] = cases.recall(arms["memory"])
    fields["facts_controls"] = {name: cases.recall(c) for name, c in controls.items()}
    if controls:
        fields["facts_margin"] = cases.margin(arms["memory"], list(controls.values()))
    if "quoted" in arms:
        fields["facts_quoted"] = cases.recall(arms["quoted"])
        fields["facts_quoted_margin"] = cases.margin(arms["quoted"], list(controls.values()))
    return fields


def recall_by(cases: CaseFigures, groups: Sequence[str]) -> dict[str, Interval]:
    """The memory arm's recall by group, of groups in which the native arm recalls some facts."""
    return {
        group: Interval(**cases.recall(rows=rows))
        for group, rows in sorted(rows_by(groups).items())
        if cases.exact("native")[rows].any()
    }


def rows_by(groups: Sequence[str]) -> dict[str, np.ndarray]:
    """The row indices of each group."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return {group: np.array(indices) for group, indices in rows.items()}


def distance_range(distance: int) -> str:
    """The label of a distance's range, in tokens."""
    low = max((edge for edge in DISTANCES if edge <= distance), default=0)
    return f"from {low:3} tokens"
