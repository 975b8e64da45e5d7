"""The certificate: what a W-Matrix was measured to keep, by which protocol, on what."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from awareness_vllm.align.aligner import TAIL
from awareness_vllm.anchors.corpus import Document, digest
from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.geometry import Strict
from awareness_vllm.wmatrix.bootstrap import mean
from awareness_vllm.wmatrix.cost import map_flop, prefill_flop, share_of_prefill
from awareness_vllm.wmatrix.evaluate import (
    Bench,
    CaseFigures,
    TextFigures,
    cut_evenly,
    evaluate_cases,
    evaluate_texts,
    joined,
    tail_arm,
)
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.metrics import Metrics, measure

TIERS = ((0.90, 0.85), (0.82, 0.60), (0.75, 0.30), (0.60, 0.0))
"""Lowest retention and lowest share of facts of tiers 1 to 4. The retentions are the lower ends of
the ranges published with the tiers; the facts are ours: retention alone hides their loss."""


TAILS = (TAIL, 64, 128)
"""How many last tokens of a memory the measured plans read natively, beside none; a server's is
among them."""
LENGTH_TEXTS = 16
"""Texts for each further length of context: a long one costs many short ones."""
METRIC_TEXTS = 6
"""Texts that the metrics of `metrics.py` are taken on, evenly from all of them."""


class Interval(Strict):
    """A measured figure with its 95 % bootstrap interval over documents."""

    mean: float
    ci_low: float
    ci_high: float


class Protocol(Strict):
    """What was measured on, and how. `texts` and `cases` are digests; `limit` documents of them
    were taken evenly; `context` tokens of memory, `continuation` tokens scored after it."""

    texts: str
    cases: str
    limit: int
    context: int
    continuation: int


class Plan(Strict):
    """A way to load a memory: the map for most of it, the last `tail` tokens read natively.

    `cost` is its share of the target's floating point operations for reading the whole context of
    the protocol.
    """

    tail: int
    cost: float
    retention: Interval
    facts: Interval


class Certificate(Strict):
    """The five arms' figures and what follows from them.

    `margin` is what the source's states add to the text alone: NLL of the tokens-only arm less the
    memory arm's, in nats. `kinds` is the retention by the folder that a text came from. `facts` is
    fact recall as a share of native, `facts_margin` the memory arm's exact match less the
    tokens-only arm's. `lengths` is the retention by tokens of context; `plans` are the ways to load
    that were measured, cheapest first.
    """

    protocol: Protocol
    texts: dict[str, dict[str, float]]
    cases: dict[str, dict[str, float]]
    metrics: Metrics
    retention: Interval
    margin: Interval
    kinds: dict[str, Interval]
    lengths: dict[int, Interval] = Field(default_factory=dict)
    plans: tuple[Plan, ...] = ()
    facts: Interval
    facts_margin: Interval
    counts: dict[str, int]
    tier: int | None
    measured: datetime.date
    hardware: str
    versions: dict[str, str]


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
    bench = Bench(Path(source), Path(target), wmatrix)
    tails = [tail for tail in TAILS if tail < context]
    on_texts = evaluate_texts(
        bench,
        texts,
        context=context,
        continuation=continuation,
        limit=limit,
        tails=tails,
        progress=progress,
    )
    by_length = {
        length: evaluate_texts(
            bench,
            joined(texts, length + continuation),
            context=length,
            continuation=continuation,
            limit=min(limit, LENGTH_TEXTS),
            progress=progress,
        ).retention()
        for length in lengths
    }
    on_cases = evaluate_cases(bench, cases, limit=limit, tails=tails, progress=progress)
    mapped, native = map_flop(wmatrix), prefill_flop(bench.target_model, context)
    plans = [
        Plan(
            tail=tail,
            cost=share_of_prefill(mapped, native, context, tail),
            retention=Interval(**on_texts.retention(arm)),
            facts=Interval(**on_cases.recall(arm)),
        )
        for tail, arm in ((0, "memory"), *((tail, tail_arm(tail)) for tail in tails))
    ]
    cuts = cut_evenly(bench, texts, context, continuation, METRIC_TEXTS)
    metrics = measure(bench, [(text, ids) for _, text, ids in cuts])
    protocol = Protocol(
        texts=digest(texts),
        cases=digest(as_documents(cases)),
        limit=limit,
        context=context,
        continuation=continuation,
    )
    manifest = wmatrix.manifest.model_copy(
        update={
            "certificate": certificate(
                protocol, on_texts, on_cases, metrics, by_length, plans
            ).model_dump(mode="json")
        }
    )
    return replace(wmatrix, manifest=manifest)


def certificate(
    protocol: Protocol,
    texts: TextFigures,
    cases: CaseFigures,
    metrics: Metrics,
    lengths: Mapping[int, Mapping[str, float]],
    plans: Sequence[Plan],
) -> Certificate:
    """What the measured figures say."""
    on_texts, on_cases = texts.summary(), cases.summary()
    facts = cases.recall()
    return Certificate(
        protocol=protocol,
        texts=on_texts["arms"],
        cases=on_cases["arms"],
        metrics=metrics,
        retention=on_texts["retention"],
        margin=mean(texts.nll("tokens_only") - texts.nll("memory")),
        kinds={kind: texts.retention(rows=rows) for kind, rows in by_kind(texts.names).items()},
        lengths={
            length: Interval(**found)
            for length, found in sorted({protocol.context: texts.retention(), **lengths}.items())
        },
        plans=sorted(plans, key=lambda plan: plan.cost),
        facts=facts,
        facts_margin=mean(cases.exact("memory") - cases.exact("tokens_only")),
        counts={"texts": on_texts["n"], "cases": on_cases["n"]},
        tier=tier(on_texts["retention"]["mean"], facts["mean"]),
        measured=datetime.date.today(),
        hardware=f"{os.cpu_count()} × {processor()}",
        versions={p: importlib.metadata.version(p) for p in ("torch", "transformers")},
    )


def by_kind(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of the texts of each kind: the folder that a text came from."""
    kinds: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        kinds.setdefault(name.split("/")[0], []).append(row)
    return {kind: np.array(rows) for kind, rows in kinds.items()}


def cheapest(certificate: Certificate, quality_target: float) -> Plan:
    """The cheapest measured plan that keeps so much.

    Raises:
        QualityUnreachable: none does; the best one and the remedy are named.
    """
    for plan in certificate.plans:
        if plan.retention.mean >= quality_target:
            return plan
    best = max(certificate.plans, key=lambda plan: plan.retention.mean)
    raise QualityUnreachable(
        f"no measured plan keeps {quality_target:.3f}",
        found=f"at best {best.retention.mean:.3f}, with the last {best.tail} tokens read natively",
        remedy="lower quality_target, let the target read the text itself, or fit a better map",
    )


def tier(retention: float, facts: float) -> int | None:
    """1 (excellent) to 4 (marginal); None below all of them."""
    for number, (least, least_facts) in enumerate(TIERS, 1):
        if retention >= least and facts >= least_facts:
            return number
    return None


def as_documents(cases: Sequence[dict[str, str]]) -> list[Document]:
    """Cases in the form that has a digest."""
    return [Document(case["question"] + case["answer"], case["context"]) for case in cases]


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def lines(document: dict[str, Any]) -> list[str]:
    """A certificate for the terminal."""
    found = Certificate.model_validate(document)

    def interval(name: str, i: Interval) -> str:
        return f"  {name:28}{i.mean:7.3f}   95 % CI {i.ci_low:.3f} … {i.ci_high:.3f}"

    counts = found.counts
    return [
        f"certified {found.measured}: tier {found.tier or 'none'} "
        f"({counts['texts']} texts of {found.protocol.context} tokens, {counts['cases']} facts; "
        f"{found.hardware})",
        interval("retention", found.retention),
        *(interval(f"  {kind}", i) for kind, i in sorted(found.kinds.items())),
        *(interval(f"  {n} tokens", i) for n, i in found.lengths.items() if len(found.lengths) > 1),
        *(interval(f"  tail {p.tail}, {p.cost:.0%} of prefill", p.retention) for p in found.plans),
        interval("facts, share of native", found.facts),
        interval("above tokens only, nats", found.margin),
        interval("above tokens only, facts", found.facts_margin),
        f"  {'top-1 agreement':28}{found.texts['memory']['top1']:7.3f}",
        f"  {'semantic preservation':28}{average(found.metrics.semantic_preservation):7.3f}",
        f"  {'attention fidelity':28}{average(found.metrics.attention_fidelity):7.3f}",
        f"  {'gradient stability':28}{'pass' if found.metrics.gradient_stability else 'fail':>7}",
    ]
