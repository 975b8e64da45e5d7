"""`awareness fit`: learn a W-Matrix from one model to another."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

HELP = "fit a W-Matrix from a source model to a target model"

CONFIGURATION = {
    "tokens": "anchor tokens to read",
    "layers": "source layers to read, evenly spread (default: half of them)",
    "rank": "width of the latent",
    "calibration": "calibration texts; 0 for none",
    "batch": "calibration texts of a step",
    "epochs": "passes over the calibration texts",
    "workers": "processes that tokenise beside a GPU",
    "seed": "seed of all random choices",
}
"""The fields of FitConfig that are options of whole numbers, with their help."""
OTHERS = ("choice", "minutes", "lessons", "device")
"""Its other options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="folder of the model that makes memories")
    parser.add_argument("--target", required=True, help="folder of the model that is served")
    parser.add_argument("--anchors", required=True, nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.wmatrix")
    # No defaults here: FitConfig has them.
    for name, help_text in CONFIGURATION.items():
        parser.add_argument(f"--{name}", type=int, help=help_text)
    parser.add_argument(
        "--minutes",
        type=float,
        help="time of the calibration, with as many texts as it holds",
    )
    parser.add_argument(
        "--lessons",
        choices=("short", "long"),
        help="calibration texts: short ones, or facts hidden in 300 to 2,000 tokens of prose",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), help="where models and sums are"
    )
    parser.add_argument(
        "--choice",
        choices=("spread", "best", "full"),
        help="source layers to read: evenly spread, the most informative, or those without a "
        "sliding window",
    )
    parser.add_argument(
        "--without-text",
        action="store_true",
        help="read the source's states alone, for packages captured without text",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.anchors.corpus import load
    from awareness_vllm.fit.config import FitConfig
    from awareness_vllm.fit.distributed import join
    from awareness_vllm.fit.fit import fit

    options = {name: getattr(args, name) for name in (*CONFIGURATION, *OTHERS)}
    config = FitConfig(**{name: value for name, value in options.items() if value is not None})
    if args.without_text:
        config = replace(config, predecessors=None)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = args.out.with_name(f".{args.out.name}.work")
    wmatrix = fit(args.source, args.target, load(args.anchors), config, folder=work)
    if join()[0] > 0:  # under torchrun all processes end with the same map; the first speaks
        raise SystemExit(0)
    wmatrix.save(args.out)
    manifest = wmatrix.manifest
    return {
        "path": str(args.out),
        "bytes": args.out.stat().st_size,
        "rank": manifest.rank,
        "r2": manifest.r2,
        "anchors": manifest.anchors.model_dump(),
    }


def show(result: dict[str, Any]) -> None:
    r2 = ", ".join(f"{name} {value:.3f}" for name, value in result["r2"].items())
    print(f"{result['path']}: rank {result['rank']}, {result['anchors']['tokens']} tokens, R² {r2}")
