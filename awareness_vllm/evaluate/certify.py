"""Certify: measure the five arms on held-out texts and facts, and write the certificate."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from awareness_vllm.anchors.corpus import Document, digest, sources
from awareness_vllm.evaluate.bootstrap import mean
from awareness_vllm.evaluate.conditions import EvalHarness, tail_condition
from awareness_vllm.evaluate.evaluate import (
    CaseFigures,
    TextFigures,
    cut_evenly,
    evaluate_cases,
    evaluate_texts,
    joined,
)
from awareness_vllm.evaluate.flops import map_flop, prefill_flop, share_of_prefill
from awareness_vllm.evaluate.metrics import measure
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
"""Shares of a context that the measured plans read natively, beside none and a server's tail."""
TAIL_STEP = 16
"""Tails are whole blocks of vLLM's cache."""
DISTANCES = (0, 64, 128)
"""Where the ranges begin in which recall is reported by distance, in tokens."""
METRIC_TEXTS = 6
"""Texts that the metrics of `metrics.py` are taken on, evenly from all of them."""


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
    """Measure a W-Matrix and write what was found into it.

    Args:
        texts, cases: from sources that no anchor came from.
        limit: at most so many texts, and as many cases.
        lengths: tokens of context to measure retention at besides `context`; texts that are too
            short are read in a row.
    """
    harness = EvalHarness(Path(source), Path(target), wmatrix)
    measured = {
        length: evaluate_texts(
            harness,
            texts if length == context else joined(texts, length + continuation),
            context=length,
            continuation=continuation,
            limit=limit if length == context else min(limit, LENGTH_TEXTS),
            tails=tails(wmatrix, length),
            progress=progress,
        )
        for length in sorted({context, *lengths})
    }
    on_cases = evaluate_cases(
        harness, cases, limit=limit, tails=tails(wmatrix, context), progress=progress
    )
    mapped = map_flop(wmatrix)
    native = {length: prefill_flop(harness.target_model, length) for length in measured}
    plans = [
        plan(
            length,
            tail,
            share_of_prefill(mapped, native[length], length, tail),
            figures,
            on_cases if length == context else None,
        )
        for length, figures in measured.items()
        for tail in (0, *tails(wmatrix, length))
    ]
    metrics = None
    if wmatrix.manifest.reads_tokens:
        cuts = cut_evenly(harness, texts, context, continuation, METRIC_TEXTS)
        metrics = measure(harness, [(text, ids) for _, text, ids in cuts])
    protocol = Protocol(
        texts=digest(texts),
        cases=digest(as_documents(cases)),
        limit=limit,
        context=context,
        continuation=continuation,
        sources=sources(texts),
    )
    manifest = wmatrix.manifest.model_copy(
        update={
            "certificate": certificate(
                protocol, measured[context], on_cases, metrics, plans
            ).model_dump(mode="json")
        }
    )
    return replace(wmatrix, manifest=manifest)


def certificate(
    protocol: Protocol,
    texts: TextFigures,
    cases: CaseFigures,
    metrics: Metrics | None,
    plans: Sequence[Plan],
) -> Certificate:
    """What the measured figures say."""
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


def tails(wmatrix: WMatrix, context: int) -> list[int]:
    """How many last tokens of a context the measured plans read natively, beside none of them."""
    if not wmatrix.manifest.reads_tokens:
        return []  # without the text there is nothing to read
    shares = {round(share * context / TAIL_STEP) * TAIL_STEP for share in TAIL_SHARES}
    return sorted(tail for tail in {TAIL, *shares} if 0 < tail < context)


def plan(
    context: int, tail: int, cost: float, texts: TextFigures, cases: CaseFigures | None
) -> Plan:
    """What was measured of one way to load."""
    arm = tail_condition(tail)
    kinds = rows_by([name.split("/")[0] for name in texts.names])
    return Plan(
        context=context,
        tail=tail,
        cost=cost,
        retention=Interval(**texts.retention(arm)),
        kinds={kind: Interval(**texts.retention(arm, rows)) for kind, rows in kinds.items()},
        top1=texts.conditions[arm][:, 2].mean(),
        tokens_only=Interval(**texts.retention(tail_condition(tail, "tokens_only"))),
        facts=Interval(**cases.recall(arm)) if cases else None,
    )


def recall_by(cases: CaseFigures, groups: Sequence[str]) -> dict[str, Interval]:
    """The memory arm's recall by group of facts, of which the target itself recalls some."""
    return {
        group: Interval(**cases.recall(rows=rows))
        for group, rows in sorted(rows_by(groups).items())
        if cases.exact("native")[rows].any()
    }


def rows_by(groups: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of each group."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return {group: np.array(found) for group, found in rows.items()}


def distance_range(distance: int) -> str:
    """The range of distances that one is reported in, in tokens."""
    low = max((edge for edge in DISTANCES if edge <= distance), default=0)
    return f"from {low:3} tokens"


def as_documents(cases: Sequence[dict[str, str]]) -> list[Document]:
    """Cases in the form that has a digest."""
    return [Document(case["question"] + case["answer"], case["context"]) for case in cases]
