"""`awareness matrix`: what memories of each model keep on each other one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.options import add_wmatrices

if TYPE_CHECKING:
    from awareness_vllm.compatibility.report import Matrix

HELP = "print what each pair of models keeps: measured by certificates, or published (a prior)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_wmatrices(parser)
    parser.add_argument(
        "--priors",
        action="store_true",
        help="show published figures that nobody measured here, too",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.compatibility.matrix import matrix

    priors = []
    if args.priors:
        from awareness_vllm.compatibility.priors import published_cells

        priors = published_cells()
    found = matrix(args.wmatrix, priors=priors)
    if args.html:
        from awareness_vllm.compatibility.html.page import page

        args.html.write_text(page(matrix=found), encoding="utf-8")
    return {
        "matrix": found.model_dump(mode="json"),
        "html": str(args.html) if args.html else None,
        "table": table(found),
    }


def table(matrix: Matrix) -> str:
    """A line for each pair of which something is known or could be."""
    from awareness_vllm.compatibility.html.figures import figure, is_prior

    rows = []
    for source in matrix.sources:
        for target in matrix.targets:
            if (cell := matrix.cell(source, target)) is None:
                continue
            says = figure(cell.retention, cell.basis) if cell.retention else "not certified"
            rows.append((source, target, says + (" (prior)" if is_prior(cell.basis) else "")))
    if not rows:
        return (
            "no W-Matrix here: make one with `awareness fit`, or show what is published (--priors)"
        )
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:{first}} → {b:{second}}  {says}" for a, b, says in rows)


def show(result: dict[str, Any]) -> None:
    print(result["table"])
    if result["html"]:
        print(result["html"])
