"""Retention against cost, by rank: `python benchmarks/fidelity_curve.py --out docs/figures/NAME`.

The anchors are read once; from the same sums a map of each rank is solved (without calibration) and
measured on held-out texts. Further maps, such as calibrated ones, can be given as files. For
`--certified` maps the plans of their certificates are plotted; `--data` takes the points of an
earlier run instead of measuring. Writes NAME.json (the data) and NAME.png (the plot; needs
matplotlib).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from awareness_demo.anchors import held_out_dir
from plotting import pyplot

from awareness_vllm.anchors.corpus import load, split
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import take_excerpts
from awareness_vllm.evaluate.flops import Prefill, map_flop
from awareness_vllm.files import anchors_dir, models_dir
from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.gather import gather
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.regress import solve_map, weighting
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.hf import load_model
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix
from awareness_vllm.wmatrix.manifest import read_manifest

CONTEXT, CONTINUATION = 300, 60
HELD_OUT = ("crawl", "debian-history", "wordnet")


def main() -> None:
    args = arguments()
    document = json.loads(args.data.read_text()) if args.data else measure_points(args)
    document["certified"] = [certified_plans(path) for path in args.certified]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    plot(document, args.out.with_suffix(".png"))
    print(json.dumps(document["points"], indent=1))


def certified_plans(path: Path) -> dict[str, Any]:
    """The certified plans of a map for contexts of the protocol's length."""
    manifest = read_manifest(path)
    certificate = Certificate.model_validate(manifest.certificate)
    plans = [plan for plan in certificate.plans if plan.context == certificate.protocol.context]
    return {
        "map": path.stem,
        "rank": manifest.rank,
        "fit": manifest.fit,
        "texts": certificate.counts["texts"],
        "plans": [plan.model_dump(mode="json") for plan in plans],
    }


def measure_points(args: argparse.Namespace) -> dict[str, Any]:
    """Retention and cost of a map of each rank, and of the given files."""
    maps = {path.stem: load_wmatrix(path) for path in args.wmatrix}
    maps |= solutions(args)
    points, count = measure_maps(args, maps)
    prefill = Prefill.of(load_model(args.target), geometry_of(args.target))
    native = prefill.flop(0, CONTEXT) / CONTEXT
    return {
        "source": args.source.name,
        "target": args.target.name,
        "context": CONTEXT,
        "texts": count,
        "sources": HELD_OUT,
        "anchor_tokens": args.tokens,
        "native_flop_per_token": native,
        "points": [
            {
                "map": name,
                "rank": wmatrix.manifest.rank,
                "calibration": wmatrix.manifest.fit["calibration"],
                "flop_per_token": map_flop(wmatrix),
                "share_of_prefill": map_flop(wmatrix) / native,
                "retention": points[name],
            }
            for name, wmatrix in maps.items()
        ],
        "measured": str(datetime.date.today()),
        "hardware": hardware(),
        "versions": versions(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=models_dir() / "smollm2-135m")
    parser.add_argument("--target", type=Path, default=models_dir() / "gemma3-270m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=FitConfig.tokens)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--wmatrix", type=Path, nargs="*", default=[])
    parser.add_argument("--certified", type=Path, nargs="*", default=[])
    parser.add_argument("--data", type=Path, help="JSON of an earlier run")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def solutions(args: argparse.Namespace) -> dict[str, WMatrix]:
    """A map of each rank from the same sums."""
    config = FitConfig(tokens=args.tokens, calibration=0)
    documents = split(load([anchors_dir()]), config.held_out, config.seed)
    reader = Reader(args.source, args.target, config.predecessors)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder) / "curve", "curve")
        statistics = gather(reader, documents[0], config, checkpoint, progress=True)
        weight, ridge = weighting(reader, documents, statistics, config, checkpoint, progress=True)
    maps = {}
    for rank in args.ranks:
        one = FitConfig(tokens=args.tokens, calibration=0, rank=rank, ridge=ridge)
        sums = copy.deepcopy(statistics)
        maps[f"rank {rank}"] = solve_map(reader, documents[0], sums, weight, one)
    return maps


def measure_maps(
    args: argparse.Namespace, maps: dict[str, WMatrix]
) -> tuple[dict[str, dict[str, float]], int]:
    """Each map's retention with its interval, on the same texts."""
    harness = EvalHarness(args.source, args.target, next(iter(maps.values())))
    texts = load([held_out_dir() / name for name in HELD_OUT])
    cuts = take_excerpts(harness, texts, CONTEXT, CONTINUATION, args.texts)
    nll: dict[str, list[float]] = {name: [] for name in ("native", "none", *maps)}
    for _, context, ids in cuts:
        package, read, sink = harness.package(context), harness.ids(context), harness.sink()
        memories: dict[str, Any] = {
            "native": harness.native(read),
            "none": harness.native(read[:sink]),
        }
        for name, wmatrix in maps.items():
            harness.wmatrix = wmatrix
            memories[name] = harness.memory(package)
        for name, memory in memories.items():
            logprobs = harness.logprobs(memory, ids, CONTINUATION)
            nll[name].append(-logprobs[range(CONTINUATION), ids[1:]].mean().item())
    native, none = np.array(nll["native"]), np.array(nll["none"])
    return {name: retention(native, np.array(nll[name]), none) for name in maps}, len(cuts)


def plot(document: dict[str, Any], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for calibrated, mark, label in ((False, "o-", "ridge alone"), (True, "s", "calibrated")):
        points = sorted(
            (p for p in document["points"] if bool(p["calibration"]) is calibrated),
            key=lambda p: p["share_of_prefill"],
        )
        if not points:
            continue
        x = [p["share_of_prefill"] for p in points]
        draw(axes, x, [p["retention"] for p in points], mark, f"{label}, by rank")
        for share, point in zip(x, points, strict=True):
            axes.annotate(f" {point['rank']}", (share, point["retention"]["mean"]), va="top")
    for one in document["certified"]:
        x = [plan["cost"] for plan in one["plans"]]
        label = f"rank {one['rank']}, calibrated, by native tail ({one['texts']} texts)"
        draw(axes, x, [plan["retention"] for plan in one["plans"]], "D-", label)
        draw(axes, x, [plan["tokens_only"] for plan in one["plans"]], "x--", "its tokens only")
        for share, plan in zip(x, one["plans"], strict=True):
            axes.annotate(f" {plan['tail']}", (share, plan["retention"]["mean"]), va="top")
    axes.axvline(0.25, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("cost, share of the target's prefill FLOP")
    axes.set_ylabel("retention (95 % CI over texts)")
    axes.set_title(f"{document['source']} → {document['target']}, {document['texts']} texts")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw(
    axes: Any, x: list[float], retentions: list[dict[str, float]], mark: str, label: str
) -> None:
    """A line of retentions with their intervals."""
    y = [interval["mean"] for interval in retentions]
    error = [
        [interval["mean"] - interval["ci_low"] for interval in retentions],
        [interval["ci_high"] - interval["mean"] for interval in retentions],
    ]
    axes.errorbar(x, y, yerr=error, fmt=mark, capsize=3, label=label)


if __name__ == "__main__":
    main()
