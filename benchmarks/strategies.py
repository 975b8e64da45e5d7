"""Retention of the training-free head mappings between two models, beside the learned map.

    python benchmarks/strategies.py --source S --target T --wmatrix pair.wmatrix \
        --texts HELD_OUT… --limit 24 --out docs/figures/strategies-pair.json --record

Five arms on held-out texts for every combination that differs between these two models (without
heads to merge, the merge strategies are one). `--record` writes the figures to the file from which
`KVCacheAligner` warns its users.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from awareness_vllm.aligners.training_free import (
    FIGURES,
    HEAD_MAPPINGS,
    MERGES,
    SPLITS,
    Configuration,
    Figure,
    correspondence,
    training_free,
    turns,
)
from awareness_vllm.anchors.corpus import digest, load
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import evaluate_texts
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.hf import load_model, sink_ids, states
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix


def same_between(source: Geometry, target: Geometry, configuration: Configuration) -> str:
    """The effect of a configuration between two models: equal for those that do the same.

    Raises:
        UnsupportedModel: heads that it cannot map.
    """
    _, shares = correspondence(source, target, configuration)
    merges = any((layer > 0).sum(1).max() > 1 for layer in shares)
    splits = any(turns(layer).any() for layer in shares)
    parts = (
        [layer.tolist() for layer in shares],
        configuration.merge_strategy if merges else None,
        configuration.split_strategy if splits else None,
    )
    return json.dumps(parts)


def groups(source: Geometry, target: Geometry) -> tuple[list[list[Configuration]], dict[str, str]]:
    """Groups of configurations of the same effect, and why the others cannot be used."""
    by_effect: dict[str, list[Configuration]] = {}
    refused: dict[str, str] = {}
    for way in itertools.product(HEAD_MAPPINGS, MERGES, SPLITS, (True, False)):
        configuration = Configuration(*way)
        try:
            same = same_between(source, target, configuration)
        except UnsupportedModel as error:
            refused[configuration.head_mapping] = str(error)
        else:
            by_effect.setdefault(same, []).append(configuration)
    return list(by_effect.values()), refused


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every mapping in five arms, and the learned map."""
    source, target = resolve_folder(args.source), resolve_folder(args.target)
    geometries = geometry_of(source), geometry_of(target)
    texts = load(args.texts)
    sink = sink_ids(target)
    sink_states = states(load_model(target), sink)
    configurations, refused = groups(*geometries)
    harness: EvalHarness | None = None
    rows: list[Figure] = []

    def measure(wmatrix: WMatrix, same: Sequence[Configuration]) -> None:
        nonlocal harness
        harness = harness or EvalHarness(source, target, wmatrix)
        harness.wmatrix = wmatrix
        lengths = {"context": args.context, "continuation": args.continuation}
        summary = evaluate_texts(harness, texts, limit=args.limit, **lengths).summary()
        for configuration in same:
            rows.append(
                Figure(
                    source=geometries[0].name,
                    target=geometries[1].name,
                    weights=(geometries[0].weights, geometries[1].weights),
                    configuration=asdict(configuration),
                    retention=summary["retention"],
                    conditions=summary["conditions"],
                    context=args.context,
                    n=summary["n"],
                    texts=digest(texts),
                    measured=datetime.date.today().isoformat(),
                    hardware=hardware(),
                    versions=versions(),
                )
            )
        print(f"{same[0]}: {rows[-1]}", flush=True)

    if args.wmatrix:
        measure(load_wmatrix(args.wmatrix), [Configuration()])
    for same in configurations:
        measure(training_free(*geometries, same[0], sink, sink_states), same)
    return {"rows": [row.model_dump(mode="json") for row in rows], "refused": refused}


def record(rows: Sequence[dict[str, Any]]) -> None:
    """Replace the records of the same mappings between the same models; the learned map has its
    certificate."""

    def what(row: dict[str, Any]) -> str:
        return json.dumps([row["weights"], row["configuration"]], sort_keys=True)

    records = {what(row): row for row in json.loads(FIGURES.read_text())}
    records |= {what(r): r for r in rows if r["configuration"]["head_mapping"] != "learned"}
    FIGURES.write_text(json.dumps(list(records.values()), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--wmatrix", type=Path, help="the learned map, measured beside them")
    parser.add_argument("--texts", nargs="+", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--continuation", type=int, default=60)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--record", action="store_true", help="keep them for KVCacheAligner")
    args = parser.parse_args()
    results = run(args)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.record:
        record(results["rows"])


if __name__ == "__main__":
    main()
