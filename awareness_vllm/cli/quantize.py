"""`awareness quantize`: a W-Matrix in half of the bytes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "round a W-Matrix to int8, which halves its file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wmatrix", type=Path, metavar="FILE.wmatrix")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.wmatrix")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.wmatrix.file import load

    load(args.wmatrix).to_int8().save(args.out)
    return {
        "path": str(args.out),
        "bytes": args.out.stat().st_size,
        "bytes_before": args.wmatrix.stat().st_size,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['path']}: {result['bytes'] / 1e6:.1f} MB of {result['bytes_before'] / 1e6:.1f}; "
        "not certified until `awareness certify` measures it"
    )
