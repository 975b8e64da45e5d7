"""Latent packages beside the packages that they were made of: bytes, load times, what they keep.

    python benchmarks/latent_packages.py --source DIR --target DIR --wmatrix FILE --texts FOLDER…
        --cases FILE.jsonl --out FILE.json

Each text is captured once and exported twice, as its latent and as that in int8. *Retention* is of
the map alone, no tail, over the 60 tokens that follow, and differences are paired by text; *facts*
are exact greedy answers to the cases nearest to each length. A *load* goes from the file to the
target's aligned states, as a worker does it on a CPU: the file in the page cache, or evicted from
it (`disk`). The three forms take turns. *Front end* is the read that resolves an ID.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from awareness_vllm.align.latent import to_latent
from awareness_vllm.align.realign import AlignedMemory, Realignment, sources
from awareness_vllm.anchors.corpus import load as load_texts
from awareness_vllm.cli.eval import read_cases
from awareness_vllm.evaluate.arms import Item, Segments, score
from awareness_vllm.evaluate.bootstrap import margin, retention, share
from awareness_vllm.evaluate.certify import by_length
from awareness_vllm.evaluate.conditions import EvalHarness, token_nll
from awareness_vllm.evaluate.evaluate import (
    case_item,
    join_documents,
    sample_evenly,
    take_excerpts,
)
from awareness_vllm.models.tokens import load_tokenizer
from awareness_vllm.packages.file import AnyPackage, Package, publish, read_ahead, read_index
from awareness_vllm.packages.store import digest_in
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.features import joined
from awareness_vllm.wmatrix.file import WMatrix, load

FORMS = ("plain", "latent", "int8")
CONTINUATION = 60
SHORTEST = 300
"""Tokens of a context that single texts are long enough for; for longer ones they are joined."""
PLACEHOLDER = "mem_" + "0" * 32
LARGEST = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--wmatrix", type=Path, required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--cases", type=Path, help="cases of fact recall, with their `tokens`")
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 2000])
    parser.add_argument("--limit", type=int, nargs="+", default=[32, 16], help="texts, by length")
    parser.add_argument("--facts", type=int, nargs="+", default=[48, 16], help="cases, by length")
    parser.add_argument("--rounds", type=int, default=15, help="loads of each form")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    harness = EvalHarness(args.source, args.target, load(args.wmatrix))
    texts, cases = load_texts(args.texts), read_cases(args.cases) if args.cases else []
    grouped = by_length(cases, sorted(args.lengths), SHORTEST) if cases else {}
    report: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "lengths": {}}
    for length, limit, facts in zip(args.lengths, args.limit, args.facts, strict=True):
        documents = texts if length <= SHORTEST else join_documents(texts, length + CONTINUATION)
        excerpts = take_excerpts(harness, documents, length, CONTINUATION, limit)
        packages = [harness.package(text) for _, text, _ in tqdm(excerpts, desc="capture")]
        figures: dict[str, Any] = {"files": file_figures(harness, packages, args.rounds)}
        items = [
            Item(package, ids, CONTINUATION)
            for package, (_, _, ids) in zip(packages, excerpts, strict=True)
        ]
        figures["texts"] = text_figures(harness, items)
        if length in grouped:
            chosen = sample_evenly(grouped[length], facts)
            tokenizer = load_tokenizer(str(args.target))
            captured = ((case, harness.package(case["context"])) for case in chosen)
            questions = [case_item(tokenizer, case, p, p) for case, p in captured]
            figures["facts"] = fact_figures(harness, questions)
        report["lengths"][length] = figures
        print(json.dumps({length: figures}, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def forms(harness: EvalHarness, package: Package) -> dict[str, AnyPackage]:
    """A package, its latent, and that in int8."""
    embed, wmatrix = harness.target_model.get_input_embeddings(), map_of(harness)
    exported = {
        name: to_latent(
            package,
            wmatrix,
            harness.target,
            embed,
            package_id=PLACEHOLDER,
            int8=name == "int8",
        )
        for name in FORMS[1:]
    }
    return {"plain": package, **exported}


def map_of(harness: EvalHarness) -> WMatrix:
    assert harness.wmatrix is not None
    return harness.wmatrix


# What is kept


def scored(
    harness: EvalHarness, items: Sequence[Item], see: Callable[[str, torch.Tensor, Item], float]
) -> dict[str, np.ndarray]:
    """What `see` makes of the log probabilities [scored, V] of each item, by condition."""
    figures: dict[str, list[float]] = defaultdict(list)
    for item in tqdm(items, desc="conditions"):
        ids = harness.ids(item.package.text)
        native = harness.native(ids)
        whole = joined(native.keys, native.values)
        arms: dict[str, Segments] = {"native": (whole,), "none": (whole[: harness.sink()],)}
        memories = {
            name: harness.memory(package) for name, package in forms(harness, item.package).items()
        }
        for name, memory in memories.items():
            arms[name] = (joined(memory.keys, memory.values),)
        same = torch.equal(arms["plain"][0], arms["latent"][0])
        figures["same"].append(float(same))
        for _, name, logprobs in score(harness, [item], [arms]):
            figures[name].append(see(name, logprobs, item))
    return {name: np.array(values) for name, values in figures.items()}


def text_figures(harness: EvalHarness, items: Sequence[Item]) -> dict[str, Any]:
    """Retention of each form, and its difference from the plain package's."""
    nll = scored(harness, items, lambda name, probs, item: float(token_nll(probs, item.ids).mean()))
    native, none = nll["native"], nll["none"]
    return {
        "n": len(items),
        "bit for bit": int(nll["same"].sum()),
        "retention": {name: retention(native, nll[name], none) for name in FORMS},
        "difference": {
            name: margin(nll["plain"] - nll[name], [np.zeros(len(items))], none - native)
            for name in FORMS[1:]
        },
        "largest difference of a text, nats": {
            name: float(np.abs(nll[name] - nll["plain"]).max()) for name in FORMS[1:]
        },
    }


def fact_figures(harness: EvalHarness, items: Sequence[Item]) -> dict[str, Any]:
    """Exact answers of each form."""

    def exact(name: str, logprobs: torch.Tensor, item: Item) -> float:
        labels = torch.tensor(item.ids[-item.scored :])
        return float((logprobs.argmax(-1) == labels).all())

    right = scored(harness, items, exact)
    ones = np.ones(len(items))
    return {
        "n": len(items),
        "exact": {name: share(right[name], ones) for name in ("native", *FORMS, "none")},
        "changed": {name: int(np.abs(right[name] - right["plain"]).sum()) for name in FORMS[1:]},
    }


# What it takes


def file_figures(harness: EvalHarness, packages: Sequence[Package], rounds: int) -> dict[str, Any]:
    """Bytes of all packages' files by form, and times of loads of the first of them."""
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, list[Path]] = defaultdict(list)
        for package in tqdm(packages, desc="files"):
            for name, form in forms(harness, package).items():
                paths[name].append(publish(form, Path(folder) / name, sealed=False))
        sizes = {name: sum(path.stat().st_size for path in paths[name]) for name in FORMS}
        tokens = sum(len(read_index(path).tokens) for path in paths["latent"])
        return {
            "bytes": {name: round(size / len(packages)) for name, size in sizes.items()},
            "bytes a token of the target": {
                name: round(size / tokens, 1) for name, size in sizes.items()
            },
            "share of plain": {name: sizes[name] / sizes["plain"] for name in FORMS[1:]},
            "load, ms": load_times(harness, {name: paths[name][0] for name in FORMS}, rounds),
        }


def load_times(
    harness: EvalHarness, paths: dict[str, Path], rounds: int
) -> dict[str, dict[str, float]]:
    """Medians in milliseconds by form, of turns."""
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in FORMS}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            for kind, evicted in (("cached", False), ("disk", True)):
                if evicted:
                    evict(path)
                began = time.perf_counter()
                aligned(harness, path)
                took = time.perf_counter() - began
                if turn:  # the first one maps pages and wakes threads
                    times[name][kind].append(took)
            began = time.perf_counter()
            read_index(path, digest=digest_in(path.stem))
            times[name]["front end"].append(time.perf_counter() - began)
    return {
        name: {kind: round(1e3 * statistics.median(took), 1) for kind, took in kinds.items()}
        for name, kinds in times.items()
    }


def aligned(harness: EvalHarness, path: Path) -> AlignedMemory:
    """A file's memory, as a worker loads it."""
    wmatrix = map_of(harness)
    package, check = read_ahead(path, digest_in(path.stem), LARGEST)
    ids, source = sources(package, wmatrix.manifest, harness.target)
    embed = harness.target_model.get_input_embeddings()
    work = Realignment(package, wmatrix, ids, source, embed, dtype=harness.dtype)
    while not work.step():
        pass
    check()
    return work.memory


def evict(path: Path) -> None:
    """Take a file's pages out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
