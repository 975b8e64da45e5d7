"""`awareness align-on-demand`: a certified W-Matrix for two models, within a budget of time."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

HELP = "fit, certify and register a W-Matrix within a budget of time"
UNITS = {"s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="folder of the model that makes memories")
    parser.add_argument("--target", required=True, help="folder of the model that is served")
    parser.add_argument(
        "--budget",
        default="15m",
        metavar="TIME",
        help="time for all of it: 15m, 90s, 1h (default: 15m)",
    )
    parser.add_argument("--name", help="name to register it by (default: SOURCE--TARGET)")
    parser.add_argument(
        "--registry",
        metavar="oci://…|DIR",
        help="publish it there, too: a registry's repository, or a folder in OCI image layout",
    )
    parser.add_argument(
        "--anchors",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="texts to fit on (default: $AWARENESS_HOME/anchors)",
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="texts to certify by, of other sources (default: $AWARENESS_HOME/held-out)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        type=Path,
        metavar="FILE.jsonl",
        help="cases of fact recall to certify by (default: those of $AWARENESS_HOME/held-out)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="cpu", help="where models and sums are"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")


def run(args: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    budget = seconds(args.budget)
    from awareness_vllm.aligners.on_demand import align_on_demand, summary
    from awareness_vllm.anchors.corpus import load
    from awareness_vllm.cli.eval import read_cases
    from awareness_vllm.files import anchors_dir, home
    from awareness_vllm.fit.config import FitConfig

    held_out = home() / "held-out"
    folders = args.texts or [path for path in sorted(held_out.glob("*")) if path.is_dir()]
    files = args.cases or sorted(held_out.glob("*/cases.jsonl"))
    if not folders or not files:
        raise nothing_to_certify_by(held_out)
    aligned = align_on_demand(
        args.source,
        args.target,
        anchors=load(args.anchors or [anchors_dir()]),
        texts=load(folders),
        cases=[case for file in files for case in read_cases(file)],
        budget=budget,
        name=args.name,
        registry=args.registry,
        config=FitConfig(seed=args.seed, device=args.device),
        begun=begun,
    )
    return summary(aligned)


def seconds(text: str) -> float:
    """The seconds of a budget: "15m", "90s", "1.5h", "900". Raises BadInput."""
    from awareness_vllm.errors import BadInput

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or float(match[1]) <= 0:
        raise BadInput("not a time", found=text, expected="as 15m, 90s or 1.5h", remedy="--budget")
    return float(match[1]) * UNITS[match[2] or "s"]


def nothing_to_certify_by(folder: Path) -> Exception:
    from awareness_vllm.errors import BadInput

    return BadInput(
        "nothing to certify by",
        found=f"no texts, or no cases, in {folder}",
        expected="texts and cases of fact recall, from sources that no anchor came from",
        remedy="give --texts and --cases, or install the default ones with `make anchors`",
    )


def show(result: dict[str, Any]) -> None:
    print(f"{result['path']}: {result['standing']}")
    took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result["took"].items())
    over = result["overrun"]
    print(
        f"{result['seconds']:.0f} s of {result['budget']:.0f} ({took}; "
        + (f"{over:.0f} s over" if over > 0 else f"{-over:.0f} s left")
        + f"); {result['anchors']:,} anchor tokens, rank {result['rank']}"
    )
