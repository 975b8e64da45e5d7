"""`awareness heads`: which source heads a W-Matrix listens to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "print, for each target head, the source heads that weigh most in a W-Matrix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wmatrix", type=Path, metavar="FILE.wmatrix")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="so many heads of each")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw all shares as a heat map (matplotlib)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.wmatrix.file import load
    from awareness_vllm.wmatrix.heads import head_mapping_summary, table

    wmatrix = load(args.wmatrix)
    if args.plot:
        from awareness_vllm.wmatrix.heat_map import heat_map

        heat_map(wmatrix, args.plot)
    rows = head_mapping_summary(wmatrix, args.top)
    return {
        "source": wmatrix.manifest.source.name,
        "target": wmatrix.manifest.target.name,
        "plot": str(args.plot) if args.plot else None,
        "heads": [
            {
                "target": str(row.target),
                "sources": [{"head": str(head), "share": share} for head, share in row.shares],
                "tokens": row.tokens,
            }
            for row in rows
        ],
        "table": table(rows),
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['target']} ← {result['source']}, shares of the map's weight")
    print(result["table"])
    if result["plot"]:
        print(result["plot"])
