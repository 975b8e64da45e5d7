"""Which passages a question finds: each strategy's hits on facts hidden in prose.

    python benchmarks/passages.py --target T --out docs/figures/passages.json

A hit: the chosen spans hold every sentence that the answer needs, whole. The strategy is chosen on
the cases of even index; figures are those of odd index. Only the target's tokenizer and embedding
are read, no model runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from awareness_demo.anchors import held_out_dir
from awareness_demo.needles import KINDS, LENGTHS

from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.passages.index import PassageIndex
from awareness_vllm.passages.strategies import STRATEGIES
from awareness_vllm.passages.vectors import word_vectors
from awareness_vllm.provenance import hardware, versions

BUDGETS = (24, 48, 96)
Case = dict[str, Any]


def is_hit(index: PassageIndex, spans: Sequence[tuple[int, int]], case: Case) -> bool:
    """Whether the spans hold every sentence that the answer needs."""
    ranges = [index.characters(span) for span in spans]
    return all(any(a <= b and e <= z for a, z in ranges) for b, e in case["sentences"])


def measure(
    cases: Sequence[Case], indexes: Sequence[PassageIndex], name: str
) -> tuple[np.ndarray, list[float]]:
    """Hits [N, budgets] of a strategy, and the mean tokens that it chooses at each budget."""
    hits, tokens = [], []
    for case, index in zip(cases, indexes, strict=True):
        chosen = [index.choose(case["question"], budget, name) for budget in BUDGETS]
        hits.append([is_hit(index, spans, case) for spans in chosen])
        tokens.append([sum(end - begin for begin, end in spans) for spans in chosen])
    return np.array(hits), np.mean(tokens, axis=0).round(1).tolist()


def milliseconds(cases: Sequence[Case], indexes: Sequence[PassageIndex], name: str) -> float:
    """The median time of a choice by an index that was asked before, in ms."""
    times = []
    for case, index in zip(cases, indexes, strict=True):
        index.choose(case["question"], strategy=name)
        start = time.perf_counter()
        index.choose(case["question"], strategy=name)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Hits of every strategy, kind and length at every budget, and its time."""
    target = resolve_folder(args.target)
    tokenizer = load_tokenizer(str(target))
    vectors = word_vectors(target)
    cases = [json.loads(line) for line in args.cases.read_text().splitlines()]
    spans = [tokenize(tokenizer, case["context"]).spans for case in cases]
    start = time.perf_counter()
    indexes = [
        PassageIndex.of(case["context"], s, 1, vectors=vectors)
        for case, s in zip(cases, spans, strict=True)
    ]
    indexed = (time.perf_counter() - start) / sum(map(len, spans)) * 2e6
    kinds, lengths = (np.array([case[field] for case in cases]) for field in ("kind", "tokens"))
    chosen_on = np.arange(len(cases)) % 2 == 0
    at_2000 = [i for i in range(len(cases)) if lengths[i] == 2000]
    strategies = {}
    for name in args.strategies or STRATEGIES:
        hits, tokens = measure(cases, indexes, name)
        strategies[name] = {
            "development": hits[chosen_on].mean(0).round(4).tolist(),
            "hits": hits[~chosen_on].mean(0).round(4).tolist(),
            "tokens": tokens,
            "by_kind": {
                half: {k: hits[(kinds == k) & rows].mean(0).round(4).tolist() for k in KINDS}
                for half, rows in (("development", chosen_on), ("hits", ~chosen_on))
            },
            "by_length": {
                n: hits[(lengths == n) & ~chosen_on].mean(0).round(4).tolist() for n in LENGTHS
            },
            "ms": round(
                milliseconds([cases[i] for i in at_2000], [indexes[i] for i in at_2000], name), 3
            ),
        }
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "target": target.name,
        "budgets": BUDGETS,
        "cases": len(cases),
        "index_ms_2000": round(indexed, 2),
        "strategies": strategies,
    }


def show(figures: dict[str, Any], half: str) -> None:
    """A table of hits at every budget, of all cases and by kind."""
    kinds = list(KINDS)
    print(f"\n| {half} | ms | tokens | all | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 4)}")
    for name, one in figures["strategies"].items():
        shares = [one[half], *(one["by_kind"][half][kind] for kind in kinds)]
        tokens = " · ".join(f"{size:.0f}" for size in one["tokens"])
        cells = [name, f"{one['ms']:.2f}", tokens]
        cells += [" · ".join(f"{share:.2f}" for share in cell) for cell in shares]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True, type=Path)
    parser.add_argument("--cases", type=Path, default=held_out_dir() / "needles" / "cases.jsonl")
    parser.add_argument("--strategies", nargs="*", choices=list(STRATEGIES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = run(args)
    for half in ("development", "hits"):
        show(figures, half)
    print(f"\nan index of 2,000 tokens: {figures['index_ms_2000']} ms")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
