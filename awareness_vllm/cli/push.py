"""`awareness push`: memories and W-Matrices into a registry, or into a folder in OCI layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.transfers import Bar, in_parallel

if TYPE_CHECKING:
    from awareness_vllm.wmatrix.listing import Listing

HELP = "push memories and W-Matrices into a registry, or a folder in OCI layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="+", metavar="ID|FILE", help="memories' IDs, or files")
    parser.add_argument(
        "registry", metavar="REF", help="oci://HOST/REPOSITORY or a folder, perhaps with :TAG"
    )
    parser.add_argument("--store", type=Path, help="folder in which IDs are looked up")
    parser.add_argument("--name", help="the name that it is listed by (default: the file's own)")
    parser.add_argument("--description", help="a line about it")
    parser.add_argument("--license", help="SPDX expression, such as CC-BY-4.0, or the hub's name")
    parser.add_argument(
        "--tag", action="append", default=[], help="another tag than its ID; may be repeated"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.errors import BadInput
    from awareness_vllm.marketplace.files import push_file
    from awareness_vllm.oci.connect import open_repository
    from awareness_vllm.oci.reference import Reference
    from awareness_vllm.packages.store import locate

    reference = Reference.parse(args.registry)
    tags = [*args.tag, *([reference.tag] if reference.tag else [])]
    for tag in tags:
        reference.at(tag)  # a tag that none can be is an error before anything is pushed
    of_one = [name for name in ("name", "description") if getattr(args, name)] + tags
    if reference.digest or (len(args.what) > 1 and of_one):
        raise BadInput(
            "nothing was pushed",
            found=reference.digest or f"{of_one[0]!r} for {len(args.what)} files",
            expected="name, description and tags for one file alone, and no digest",
        )
    paths = [locate(what, args.store) for what in args.what]
    repository = open_repository(reference)
    facts = {"name": args.name, "description": args.description, "license": args.license}
    with Bar("push", sum(path.stat().st_size for path in paths)) as bar:

        def one(path: Path) -> dict[str, Any]:
            listing, descriptor = push_file(
                path, repository, tags=tags, progress=bar.update, **facts
            )
            return described(listing) | {
                "path": str(path),
                "reference": str(reference.at(descriptor.digest)),
                "tags": [listing.tag, *tags],
            }

        return {"pushed": in_parallel(one, paths)}


def described(listing: Listing) -> dict[str, Any]:
    """What identifies a listed file."""
    from awareness_vllm.packages.listing import PackageListing

    if isinstance(listing, PackageListing):
        kind = {"kind": "memory", "id": listing.id}
    else:
        kind = {"kind": "wmatrix", "source": listing.source_model, "target": listing.target_model}
    return kind | {"name": listing.name, "digest": listing.digest, "bytes": listing.bytes}


def show(result: dict[str, Any]) -> None:
    for pushed in result["pushed"]:
        print(f"{pushed['tags'][0]}  {pushed['name']}  {pushed['reference']}")
