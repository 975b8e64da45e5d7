"""The errors of the estimates of a memory's retention.

    python benchmarks/estimates.py --source A --target B --wmatrix FILE [--out FILE.json]

Memories of kinds of text and of lengths that neither anchors nor the certificate contain. The
target goes on with each one's text for `--continuation` tokens: by default as many as in the
certificate's protocol. Two estimates: the certificate's, and the quick measurement on the memory's
own last part (`check --measure`). A *case* is one memory on one target; below, cells of one kind
and one length. `spread` is the error that would be left to whoever knew each cell's mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from awareness_demo.debian import unpack
from awareness_demo.sources import pages, texts
from tqdm import tqdm

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.compatibility.estimate import predict
from awareness_vllm.compatibility.self_test import measure_with
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.conditions import EvalHarness, cut_tail, token_nll
from awareness_vllm.evaluate.evaluate import join_documents, take_excerpts
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.certificate import TAIL, Interval
from awareness_vllm.wmatrix.file import load
from awareness_vllm.wmatrix.registry import WMatrixEntry

LENGTHS = (200, 600, 1200)
DEBIAN = {
    "policy": ("debian-policy", pages("usr/share/doc/debian-policy/policy.html/*.html")),
    "installation": (
        "installation-guide-amd64",
        pages("usr/share/doc/installation-guide-amd64/en/*.html"),
    ),
    "aptitude": ("aptitude-doc-en", pages("usr/share/doc/aptitude/html/en/*.html")),
    "developers": (
        "developers-reference",
        texts("usr/share/developers-reference/_sources/*.rst.txt"),
    ),
}
PYTHON = ("argparse", "ast", "csv", "difflib", "heapq", "imaplib", "pdb", "shutil", "zipfile")
"""Modules of the standard library, whose source code is a kind of text too."""
ESTIMATES = ("certificate", "measured")


def documents() -> dict[str, list[Document]]:
    """The texts by kind."""
    texts_by_kind = {}
    for kind, (package, read) in DEBIAN.items():
        with tempfile.TemporaryDirectory() as scratch:
            tree = unpack(package, Path(scratch))
            texts_by_kind[kind] = [Document(f"{kind}/{d.name}", d.text) for d in read(tree)]
    library = Path(sysconfig.get_path("stdlib"))
    texts_by_kind["python"] = [
        Document(f"python/{name}", (library / f"{name}.py").read_text()) for name in PYTHON
    ]
    return texts_by_kind


def cases(
    harness: EvalHarness, lengths: list[int], each: int, continuation: int
) -> list[dict[str, Any]]:
    """The memories to measure: kind, length, text and the ids that follow it."""
    return [
        {"kind": kind, "length": length, "name": name, "text": text, "ids": ids}
        for kind, some in documents().items()
        for length in lengths
        for name, text, ids in take_excerpts(
            harness, join_documents(some, length + continuation), length, continuation, each
        )
    ]


def measure_case(
    harness: EvalHarness, entry: WMatrixEntry, case: dict[str, Any], tail: int
) -> dict[str, Any]:
    """One case: NLL in nats per token in three arms, and the two estimates."""
    package, ids = harness.package(case["text"]), case["ids"]
    native = harness.native(harness.ids(case["text"]))
    begin, _ = cut_tail(native, len(native.ids) - harness.sink())
    conditions = {
        "native": (native, 0),
        "memory": (harness.memory(package), tail),
        "none": (begin, 0),
    }
    nll = {
        name: token_nll(harness.logprobs(memory, ids, len(ids) - 1, tail), ids).numpy()
        for name, (memory, tail) in conditions.items()
    }
    assert entry.certificate is not None
    estimates = {"certificate": predict(entry.certificate, case["length"], tail)}
    try:
        estimates["measured"] = measure_with(harness, package, tail).retention
    except BadInput as error:  # too short for a measurement on itself
        print(f"{case['name']}: {error.what}")
    return {
        **{name: case[name] for name in ("kind", "length", "name")},
        **{name: float(values.mean()) for name, values in nll.items()},
        "estimates": {name: estimate.model_dump() for name, estimate in estimates.items()},
    }


def errors_of(rows: list[dict[str, Any]], estimate: str) -> dict[str, float]:
    """The errors of an estimate over cases, and the coverage of its intervals."""
    rows = [row for row in rows if estimate in row["estimates"]]
    actual = np.array([retention_of([row]) for row in rows])
    predicted = [Interval(**row["estimates"][estimate]) for row in rows]
    errors = np.abs([s.mean - f for s, f in zip(predicted, actual, strict=True)])
    inside = [s.ci_low <= f <= s.ci_high for s, f in zip(predicted, actual, strict=True)]
    return {
        "cases": len(rows),
        "error": float(errors.mean()),
        "median_error": float(np.median(errors)),
        "bias": float(np.mean([s.mean - f for s, f in zip(predicted, actual, strict=True)])),
        "coverage": float(np.mean(inside)),
        "width": float(np.mean([s.ci_high - s.ci_low for s in predicted])),
    }


def retention_of(rows: list[dict[str, Any]]) -> float:
    """Retention over some cases."""
    conditions = (np.array([row[name] for row in rows]) for name in ("native", "memory", "none"))
    return retention(*conditions)["mean"]


def cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the cases of one kind and one length, with the estimates."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["length"]), []).append(row)
    return [
        {
            "kind": kind,
            "length": length,
            "n": len(group),
            "retention": retention_of(group),
            **{
                name: float(np.mean([row["estimates"][name]["mean"] for row in with_it]))
                for name in ESTIMATES
                if (with_it := [row for row in group if name in row["estimates"]])
            },
        }
        for (kind, length), group in groups.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| estimate | cases | mean error | median error | bias | coverage of 95 % | width |"]
    lines.append("|---" * 7 + "|")
    for name in ESTIMATES:
        j = errors_of(rows, name)
        lines.append(
            f"| {name} | {j['cases']} | {j['error']:.3f} | {j['median_error']:.3f} | "
            f"{j['bias']:+.3f} | {j['coverage']:.0%} | {j['width']:.2f} |"
        )
    means = cells(rows)
    lines += ["", "| kind | tokens | memories | retention | " + " | ".join(ESTIMATES) + " |"]
    lines.append("|---" * 7 + "|")
    for cell in means:
        figures = " | ".join(f"{cell[name]:.3f}" if name in cell else "" for name in ESTIMATES)
        lines.append(
            f"| {cell['kind']} | {cell['length']} | {cell['n']} "
            f"| {cell['retention']:.3f} | {figures} |"
        )
    groups = {(row["kind"], row["length"]) for row in rows}
    within = [
        [retention_of([r]) for r in rows if (r["kind"], r["length"]) == group] for group in groups
    ]
    rest = [abs(x - np.mean(group)) for group in within for x in group]
    lines.append(f"\nspread: {np.mean(rest):.3f}")
    for name in ESTIMATES:
        errors = [abs(cell[name] - cell["retention"]) for cell in means if name in cell]
        lines.append(f"\n{name}: mean error over {len(errors)} cells {np.mean(errors):.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--wmatrix", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--each", type=int, default=3, help="memories of each kind and length")
    parser.add_argument("--continuation", type=int, default=60, help="tokens scored")
    parser.add_argument("--tail", type=int, default=TAIL, help="read natively, as when served")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    entry = WMatrixEntry.read(args.wmatrix)
    if entry.certificate is None:
        parser.error(f"{args.wmatrix} has no certificate to estimate from")
    harness = EvalHarness(args.source, args.target, load(args.wmatrix))
    memories = cases(harness, args.lengths, args.each, args.continuation)
    rows = [
        measure_case(harness, entry, case, args.tail) for case in tqdm(memories, desc="memories")
    ]
    document = {
        "wmatrix": entry.digest,
        "tail": args.tail,
        "continuation": args.continuation,
        "estimates": {name: errors_of(rows, name) for name in ESTIMATES},
        "cells": cells(rows),
        "cases": rows,
        "measured": str(datetime.date.today()),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(markdown(rows))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
