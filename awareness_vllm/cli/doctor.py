"""`awareness doctor`: the state of this machine and installation, and its speed of loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "check this machine and installation, and measure how fast memories load here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="MODEL", help="a model to serve here")
    parser.add_argument(
        "--wmatrix",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="FILE",
        help="W-Matrices besides those of $AWARENESS_HOME/wmatrices",
    )
    parser.add_argument("--again", action="store_true", help="measure this machine's speed again")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.compatibility.load_time.speed import FILE
    from awareness_vllm.files import home
    from awareness_vllm.serving.doctor import checks, speed
    from awareness_vllm.serving.load_benchmark import calibrated

    results = checks(args.wmatrix, args.target)
    calibration = None
    if not any(check.name == "home" and check.status == "problem" for check in results):
        calibration = calibrated(again=args.again)
        results.append(speed(calibration))
    return {
        "checks": [check.model_dump() for check in results],
        "problems": sum(check.status == "problem" for check in results),
        "calibration": calibration and calibration.model_dump(mode="json"),
        "file": str(home() / FILE),
    }


def show(result: dict[str, Any]) -> None:
    for check in result["checks"]:
        print(f"{check['status']:8} {check['name']}: {check['found']}")
        if check["remedy"]:
            print(f"{'':8} → {check['remedy']}")
    print(f"{result['problems']} problems; this machine's speed is in {result['file']}")


def status(result: dict[str, Any]) -> int:
    return 1 if result["problems"] else 0
