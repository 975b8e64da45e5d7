"""`awareness heads`: which source heads a W-Matrix listens to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "print, for each target head, the source heads that weigh most in a W-Matrix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wmatrix", type=Path, metavar="FILE.wmatrix")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="source heads to print for each target head"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with all shares as a heat map"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.wmatrix.file import load
    from awareness_vllm.wmatrix.heads import head_mapping_summary, head_shares, table

    wmatrix = load(args.wmatrix)
    if args.html:
        from awareness_vllm.compatibility.html.page import page
        from awareness_vllm.files import replace_text

        replace_text(args.html, page(heads=head_shares(wmatrix)))
    rows = head_mapping_summary(wmatrix, args.top)
    return {
        "source": wmatrix.manifest.source.name,
        "target": wmatrix.manifest.target.name,
        "html": str(args.html) if args.html else None,
        "heads": [
            {
                "target": str(row.target),
                "sources": [{"head": str(head), "share": share} for head, share in row.shares],
                "tokens": row.tokens,
            }
            for row in rows
        ],
        "table": table(rows).split("\n"),
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['target']} ← {result['source']}, shares of the map's weight")
    print("\n".join(result["table"]))
    if result["html"]:
        print(result["html"])
