"""`awareness matrix`: retention of each model's memories on each other model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.options import add_trust, add_wmatrices

if TYPE_CHECKING:
    from awareness_vllm.compatibility.report import Matrix
    from awareness_vllm.trust.policy import TrustPolicy
    from awareness_vllm.wmatrix.registry import Registry

HELP = "print the retention of each pair of models: measured by certificates, or published (priors)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_wmatrices(parser)
    parser.add_argument(
        "--registry",
        metavar="REF",
        help="instead of files here: all that is listed in oci://HOST/REPOSITORY or a folder",
    )
    parser.add_argument(
        "--priors",
        action="store_true",
        help="add published figures, which were not measured here",
    )
    add_trust(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the matrix as a page")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.compatibility.matrix import matrix, of_registry
    from awareness_vllm.trust.policy import TrustPolicy

    trust = TrustPolicy.read(args.trust)
    priors = []
    if args.priors:
        from awareness_vllm.compatibility.priors import published_cells

        priors = published_cells()
    if args.registry:
        known = of_registry(listed(args, trust), priors)
    else:
        known = matrix(args.wmatrix, priors=priors, trust=trust)
    if args.html:
        from awareness_vllm.compatibility.html.page import page
        from awareness_vllm.files import replace_text

        replace_text(args.html, page(matrix=known))
    return {
        "matrix": known.model_dump(mode="json"),
        "html": str(args.html) if args.html else None,
        "table": table(known).split("\n"),
    }


def listed(args: argparse.Namespace, trust: TrustPolicy) -> Registry:
    """All maps of a registry, by their listings, and who of the trusted signed them. Raises
    BadInput, RegistryError."""
    from awareness_vllm.errors import BadInput
    from awareness_vllm.marketplace.maps import RepositoryMaps
    from awareness_vllm.oci.connect import open_repository
    from awareness_vllm.wmatrix.registry import Registry

    if args.wmatrix:
        raise BadInput("the matrix is of files or of a registry", found="--wmatrix and --registry")
    maps = RepositoryMaps(open_repository(args.registry), trust)
    return Registry(tuple(maps.entries()))


def table(matrix: Matrix) -> str:
    """A line for each pair that has a cell, names with control characters escaped."""
    from awareness_vllm.compatibility.html.figures import figure
    from awareness_vllm.errors import escaped

    rows = []
    for source in matrix.sources:
        for target in matrix.targets:
            if (cell := matrix.cell(source, target)) is None:
                continue
            value = figure(cell.retention, cell.basis) if cell.retention else "not certified"
            kind = cell.basis.kind if cell.basis else "measured"
            value += f" ({kind})" if kind != "measured" else ""
            value += f" (signed by {cell.signed_by})" if cell.signed_by else ""
            rows.append((escaped(source), escaped(target), value))
    if not rows:
        return (
            "no W-Matrix here: make one with `awareness fit`, or show what is published (--priors)"
        )
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:{first}} → {b:{second}}  {value}" for a, b, value in rows)


def show(result: dict[str, Any]) -> None:
    print("\n".join(result["table"]))
    if result["html"]:
        print(result["html"])
