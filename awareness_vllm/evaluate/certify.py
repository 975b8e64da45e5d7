"""The certification of a W-Matrix: the five arms on held-out texts and facts."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from awareness_vllm.anchors.corpus import Document, digest, sources
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.bootstrap import mean
from awareness_vllm.evaluate.conditions import EvalHarness, tail_condition
from awareness_vllm.evaluate.evaluate import (
    CaseFigures,
    TextFigures,
    evaluate_cases,
    evaluate_texts,
    join_documents,
    take_excerpts,
)
from awareness_vllm.evaluate.flops import map_flop, prefill_flop, share_of_prefill
from awareness_vllm.evaluate.metrics import alignment_metrics
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.certificate import (
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

TAIL_SHARES = (0.16, 0.4)
"""Tails of the measured plans as shares of the context, beside none and a server's default."""
TAIL_STEP = 16
"""Tokens of a block of vLLM's cache, of which tails are multiples."""
DISTANCES = (0, 64, 128)
"""Lower ends, in tokens, of the ranges of distance by which recall is reported."""
METRIC_TEXTS = 6
"""Texts for the alignment metrics, sampled evenly."""


def certify(
    wmatrix: WMatrix,
    source: str | Path,
    target: str | Path,
    texts: Sequence[Document],
    cases: Sequence[dict[str, str]],
    *,
    limit: int,
    context: int = 300,
    continuation: int = 60,
    lengths: Sequence[int] = (),
    progress: bool = True,
) -> WMatrix:
    """The W-Matrix with a certificate of its measured figures.

    Args:
        texts, cases: from sources that no anchor came from.
        limit: the most texts, and cases, to measure on.
        lengths: tokens of further contexts to measure retention at; short texts are joined for
            them.

    Raises:
        BadInput: texts that measure nothing.
    """
    harness = EvalHarness(Path(source), Path(target), wmatrix)
    on_texts = {
        length: evaluate_texts(
            harness,
            texts if length == context else join_documents(texts, length + continuation),
            context=length,
            continuation=continuation,
            limit=limit if length == context else min(limit, LENGTH_TEXTS),
            tails=plan_tails(wmatrix, length),
            progress=progress,
        )
        for length in sorted({context, *lengths})
    }
    tails = plan_tails(wmatrix, context)
    on_cases = evaluate_cases(harness, cases, limit=limit, tails=tails, progress=progress)
    metrics = None
    if wmatrix.manifest.reads_tokens:
        excerpts = take_excerpts(harness, texts, context, continuation, METRIC_TEXTS)
        metrics = alignment_metrics(harness, [(text, ids) for _, text, ids in excerpts])
    protocol = Protocol(
        texts=digest(texts),
        cases=digest(Document(c["question"] + c["answer"], c["context"]) for c in cases),
        limit=limit,
        context=context,
        continuation=continuation,
        sources=sources(texts),
    )
    with plausible():
        plans = build_plans(harness, wmatrix, on_texts, {context: on_cases})
        certificate = build_certificate(protocol, on_texts[context], on_cases, metrics, plans)
    update = {"certificate": certificate.model_dump(mode="json")}
    return replace(wmatrix, manifest=wmatrix.manifest.model_copy(update=update))


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


def plan_tails(wmatrix: WMatrix, context: int) -> list[int]:
    """The tails, in tokens, of the plans for a context of that length, beside none."""
    if not wmatrix.manifest.reads_tokens:
        return []  # packages for it have no text to read natively
    shares = {round(share * context / TAIL_STEP) * TAIL_STEP for share in TAIL_SHARES}
    return sorted(tail for tail in {TAIL, *shares} if 0 < tail < context)


def build_plans(
    harness: EvalHarness,
    wmatrix: WMatrix,
    texts: Mapping[int, TextFigures],
    cases: Mapping[int, CaseFigures],
) -> list[Plan]:
    """The plans of all tails at all lengths of context, by figures at these lengths."""
    plans, mapped = [], map_flop(wmatrix)
    for length, figures in texts.items():
        native = prefill_flop(harness.target_model, length)
        for tail in (0, *plan_tails(wmatrix, length)):
            cost = share_of_prefill(mapped, native, length, tail)
            plans.append(build_plan(length, tail, cost, figures, cases.get(length)))
    return plans


def build_plan(
    context: int, tail: int, cost: float, texts: TextFigures, cases: CaseFigures | None
) -> Plan:
    """The plan of one tail at one length of context."""
    memory, tokens_only = tail_condition(tail), tail_condition(tail, "tokens_only")
    kinds = rows_by([name.split("/")[0] for name in texts.names])
    return Plan(
        context=context,
        tail=tail,
        cost=cost,
        retention=Interval(**texts.retention(memory)),
        kinds={kind: Interval(**texts.retention(memory, rows)) for kind, rows in kinds.items()},
        top1=texts.conditions[memory][:, 2].mean(),
        tokens_only=Interval(**texts.retention(tokens_only)),
        facts=Interval(**cases.recall(memory)) if cases else None,
    )


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
