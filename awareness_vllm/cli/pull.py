"""`awareness pull`: memories and W-Matrices out of a registry, an OCI layout or the hub's cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.options import add_registry
from awareness_vllm.cli.push import described
from awareness_vllm.cli.transfers import Bar, in_parallel

if TYPE_CHECKING:
    from awareness_vllm.marketplace.files import Pulled
    from awareness_vllm.oci.reference import Reference
    from awareness_vllm.trust.policy import TrustPolicy

HELP = "pull memories and W-Matrices out of a registry, or a folder in OCI layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="+",
        metavar="REF|ID|DIR",
        help="oci://HOST/REPOSITORY:TAG, FOLDER:TAG (or @DIGEST), or an ID or a tag in --registry; "
        "or a repository in the Hugging Face hub cache (models--OWNER--NAME)",
    )
    add_registry(parser, "--from")
    parser.add_argument(
        "--store", type=Path, help="folder for memories (default: $AWARENESS_HOME/store)"
    )
    parser.add_argument(
        "--wmatrices",
        type=Path,
        help="folder for W-Matrices (default: $AWARENESS_HOME/wmatrices)",
    )
    parser.add_argument(
        "--trust", type=Path, metavar="FILE", help="trust file: say which of its keys signed what"
    )
    parser.add_argument(
        "--require-signed",
        action="store_true",
        help="pull only what a key of the trust file has signed",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.errors import BadInput
    from awareness_vllm.files import default_store, wmatrices_dir
    from awareness_vllm.marketplace.files import find, pull
    from awareness_vllm.marketplace.hub import is_hub_folder, pull_folder
    from awareness_vllm.oci.connect import open_repository
    from awareness_vllm.packages.listing import PackageListing
    from awareness_vllm.trust.policy import TrustPolicy

    trust = TrustPolicy.read(args.trust)
    if args.require_signed and not trust:
        raise BadInput("--require-signed needs --trust", expected="a trust file with the keys")
    stores = args.store or default_store(), args.wmatrices or wmatrices_dir()
    hub = [path for path in map(Path, args.what) if is_hub_folder(path)]
    done = [
        described(pulled.listing) | placed(pulled, trust)
        for path in hub
        for pulled in pull_folder(path, *stores, trust=trust, require_signed=args.require_signed)
    ]
    references = [located(what, args.registry) for what in args.what if Path(what) not in hub]
    repositories = {r.repository_only: open_repository(r.repository_only) for r in references}
    with Bar("pull") as bar:

        def one(reference: Reference) -> dict[str, Any]:
            repository = repositories[reference.repository_only]
            assert reference.name is not None
            found, listing = find(repository, reference.name)
            bar.expect(listing.bytes)
            pulled = pull(
                repository,
                found,
                stores[0 if isinstance(listing, PackageListing) else 1],
                trust=trust,
                require_signed=args.require_signed,
                progress=bar.update,
            )
            return described(listing) | placed(pulled, trust)

        return {"pulled": [*done, *in_parallel(one, references)]}


def placed(pulled: Pulled, trust: TrustPolicy) -> dict[str, Any]:
    """Where a file is, and who signed it."""
    signers = pulled.signers.model_dump() if trust else None
    return {"path": str(pulled.path), "signers": signers}


def located(what: str, registry: str | None) -> Reference:
    """The reference of what a user names. Raises BadInput."""
    from awareness_vllm.errors import BadInput
    from awareness_vllm.oci.layout import MARKER
    from awareness_vllm.oci.reference import DIGEST, TAG, Reference, default_registry

    is_folder = (Path(what) / MARKER).exists()  # a layout's own name is no tag
    if (TAG.fullmatch(what) and not is_folder) or DIGEST.fullmatch(what):
        return Reference.parse(registry or default_registry()).at(what)
    reference = Reference.parse(what)
    if reference.name is None:
        raise BadInput(
            f"{what} names no memory and no W-Matrix",
            expected="a :TAG or @sha256:DIGEST after the repository",
            remedy="`awareness search` shows what there is",
        )
    return reference


def show(result: dict[str, Any]) -> None:
    for pulled in result["pulled"]:
        print(f"{pulled.get('id') or pulled['digest']}  {pulled['name']}  {pulled['path']}")
        for role, signer in (pulled["signers"] or {}).items():
            if signer is not None:
                print(f"  {role} signed by {signer}")
