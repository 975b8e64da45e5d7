"""`awareness search`: the memories and W-Matrices that a registry lists."""

from __future__ import annotations

import argparse
import re
from typing import Any

from awareness_vllm.cli.options import add_registry

HELP = "search the memories and W-Matrices of a registry, or of a folder in OCI layout"
RANGE = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", help="words that all occur; each may be cut short")
    add_registry(parser)
    parser.add_argument("--kind", choices=("memory", "wmatrix"), default="memory")
    parser.add_argument("--source", metavar="MODEL", help="model that computed it: folder or name")
    parser.add_argument(
        "--target",
        metavar="MODEL",
        help="model that can use it, itself or by a W-Matrix here or there: folder or name",
    )
    parser.add_argument(
        "--tokens", metavar="N|MIN-MAX", help="tokens of a memory: at most, or a range"
    )
    parser.add_argument(
        "--refresh",
        action="store_true",
        help="ask which file each tag names now (default: new tags, and some asked an hour ago)",
    )
    parser.add_argument("--limit", type=int, default=20, help="listings at most (default: 20)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.errors import BadInput
    from awareness_vllm.marketplace.market import Marketplace

    market = Marketplace(args.registry)
    limit = args.limit
    if limit < 1:
        raise BadInput("--limit cannot be used", found=str(limit), expected="1 or more")
    wanted = {
        "text": " ".join(args.text),
        "source_model": args.source,
        "target_model": args.target,
        "limit": limit + 1,  # to know whether there are more
        "refresh": args.refresh,
    }
    found: list[Any]
    if args.kind == "memory":
        found = market.memories.search(tokens=token_range(args.tokens), **wanted)
    elif args.tokens is None:
        found = market.wmatrices.search(**wanted)
    else:
        raise BadInput("a W-Matrix has no length", found="--tokens", expected="--kind memory")
    return {
        "registry": str(market.repository.reference),
        "kind": args.kind,
        "listings": [row(listing) for listing in found[:limit]],
        "more": len(found) > limit,
    }


def token_range(text: str | None) -> int | tuple[int, int] | None:
    """What --tokens says. Raises BadInput."""
    from awareness_vllm.errors import BadInput

    if text is None:
        return None
    if (match := RANGE.fullmatch(text)) is None:
        raise BadInput("--tokens cannot be used", found=text, expected="2000, or 1000-2000")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def row(listing: Any) -> dict[str, Any]:
    """What a search shows of a listing."""
    from awareness_vllm.cli.push import described
    from awareness_vllm.packages.listing import PackageListing

    facts = {"id": listing.id} | described(listing)
    facts |= {"license": listing.license, "description": listing.description}
    if isinstance(listing, PackageListing):
        latent = listing.manifest.latent
        facts |= {"latent_of": latent.package, "target": latent.target.name} if latent else {}
        return facts | {"source": listing.source_model, "tokens": listing.token_count}
    return facts | {"standing": listing.manifest.standing}


def show(result: dict[str, Any]) -> None:
    for found in result["listings"]:
        if result["kind"] == "memory":
            what = f"{found['tokens']} tokens of {found['source']}"
            what += f"  latent for {found['target']}" if "latent_of" in found else ""
        else:
            what = f"{found['source']} → {found['target']}, {found['standing']}"
        license = f"  {found['license']}" if found["license"] else ""
        print(f"{found['id']}  {what}  {size(found['bytes'])}{license}  {found['name']}")
        if found["description"]:
            print(f"  {found['description']}")
    count = len(result["listings"])
    more = ", and there are more (--limit)" if result["more"] else ""
    print(f"{count} {'listing' if count == 1 else 'listings'} in {result['registry']}{more}")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
