"""`awareness catalogue`: the memories and maps of a registry, or of this machine, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.options import add_trust, add_wmatrices

if TYPE_CHECKING:
    from awareness_vllm.compatibility.catalogue import Catalogue
    from awareness_vllm.trust.policy import TrustPolicy
    from awareness_vllm.wmatrix.listing import Listing

MOST = 1 << 20
"""Listings of one kind that a page has: its browser would hold no more."""
HELP = "write a page to search the memories and maps of a registry, or of this machine, in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", required=True, help="the page")
    parser.add_argument(
        "--registry",
        metavar="REF",
        help="oci://HOST/REPOSITORY or a layout folder (default: the store and maps of this "
        "machine); only its listings are read",
    )
    parser.add_argument("--store", type=Path, help="folder (default: $AWARENESS_HOME/store)")
    add_wmatrices(parser)
    add_trust(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.compatibility.html.page import page
    from awareness_vllm.files import replace_text
    from awareness_vllm.trust.policy import TrustPolicy

    trust = TrustPolicy.read(args.trust)
    known = of_registry(args.registry, trust) if args.registry else of_machine(args, trust)
    replace_text(args.html, page(catalogue=known))
    return {
        "html": str(args.html),
        "of": known.where,
        "memories": known.memories,
        "wmatrices": known.maps,
        "skipped": known.skipped,
    }


def of_registry(registry: str, trust: TrustPolicy) -> Catalogue:
    from awareness_vllm.compatibility.catalogue import of_listings
    from awareness_vllm.marketplace.maps import RepositoryMaps
    from awareness_vllm.marketplace.market import Marketplace

    market = Marketplace(registry)
    listings: list[Listing] = [*market.memories.search(limit=MOST)]
    listings += market.wmatrices.search(limit=MOST)
    maps = RepositoryMaps(market.repository, trust).entries() if trust else []
    signers = {entry.digest: entry.signers(None) for entry in maps}
    return of_listings(listings, market.repository.reference, signers=signers)


def of_machine(args: argparse.Namespace, trust: TrustPolicy) -> Catalogue:
    from awareness_vllm.compatibility.catalogue import of_files
    from awareness_vllm.files import default_store
    from awareness_vllm.packages.store import Store
    from awareness_vllm.wmatrix.registry import Registry

    return of_files(Store(args.store or default_store()), Registry.read(args.wmatrix, trust), trust)


def show(result: dict[str, Any]) -> None:
    skipped = f", {result['skipped']} entries skipped" if result["skipped"] else ""
    print(
        f"{result['html']}: {result['memories']} memories and {result['wmatrices']} W-Matrices of "
        f"{result['of']}{skipped}"
    )
