"""`awareness path`: the route between two models over W-Matrices, and one map composed of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from awareness_vllm.cli.options import add_wmatrices

HELP = "find the way between two models that keeps most; --compose makes one W-Matrix of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, metavar="MODEL")
    parser.add_argument("--to", dest="target", required=True, metavar="MODEL")
    add_wmatrices(parser)
    parser.add_argument(
        "--models",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="DIR",
        help="folders of the models on the way (default: $AWARENESS_HOME/models/NAME)",
    )
    parser.add_argument("--memory", metavar="ID|FILE", help="ask for a memory of this length")
    parser.add_argument("--store", type=Path, help="folder in which the ID is looked up")
    parser.add_argument(
        "--uncertified", action="store_true", help="go over maps that nobody has measured, too"
    )
    parser.add_argument(
        "--texts", nargs="+", type=Path, metavar="PATH", help="measure retention on these texts"
    )
    parser.add_argument("--limit", type=int, default=8, help="at most so many texts")
    parser.add_argument(
        "--compose",
        "--fold",
        dest="compose",
        type=Path,
        metavar="OUT.wmatrix",
        help="write the way as one W-Matrix",
    )
    parser.add_argument(
        "--anchors",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="texts to learn the bridges between hops from; without them hops are multiplied out",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.aligners.multihop import MultiHopAligner
    from awareness_vllm.anchors.corpus import load

    texts, anchors = (load(paths) if paths else None for paths in (args.texts, args.anchors))
    aligner = MultiHopAligner(args.wmatrix, models=args.models, store=args.store)
    found = aligner.find_optimal_path(
        args.source,
        args.target,
        args.memory,
        uncertified=args.uncertified,
        texts=texts,
        anchors=anchors,
        limit=args.limit,
    )
    if args.compose:
        aligner.compose(found, anchors).save(args.compose)
    return {
        "route": list(found.route),
        "wmatrices": [str(hop.path) for hop in found.hops],
        "direct_retention": found.direct_retention,
        "optimal_retention": found.optimal_retention,
        "improvement": found.improvement,
        "basis": found.basis,
        "note": found.note,
        "composed": str(args.compose) if args.compose else None,
    }


def show(result: dict[str, Any]) -> None:
    def figure(name: str, sign: str = "") -> str:
        return "unknown" if result[name] is None else f"{result[name]:{sign}.3f}"

    print(" → ".join(result["route"]))
    print(f"retention {figure('optimal_retention')} ({result['basis'] or 'nobody measured it'})")
    print(f"direct {figure('direct_retention')}, improvement {figure('improvement', '+')}")
    print(result["note"])
    if result["composed"]:
        print(f"{result['composed_map']}: not certified until `awareness certify` has measured it")
