"""`awareness show`: what a registry lists of a memory or a W-Matrix, whose file is not pulled."""

from __future__ import annotations

import argparse
from typing import Any

from awareness_vllm.cli.options import add_registry, add_trust

HELP = "print what a registry lists of a memory or a W-Matrix, without pulling it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="REF|ID",
        help="oci://HOST/REPOSITORY:TAG, FOLDER:TAG (or @DIGEST), or an ID or a tag in --registry",
    )
    add_registry(parser)
    add_trust(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.cli.pull import located
    from awareness_vllm.cli.push import described
    from awareness_vllm.marketplace.files import find
    from awareness_vllm.marketplace.signatures import candidates, signatures, signers_of
    from awareness_vllm.oci.connect import open_repository
    from awareness_vllm.packages.listing import PackageListing
    from awareness_vllm.trust.policy import TrustPolicy

    trust = TrustPolicy.read(args.trust)
    reference = located(args.what, args.registry)
    assert reference.name is not None
    repository = open_repository(reference.repository_only)
    found, listing = find(repository, reference.name)
    signed = signatures(repository, found.descriptor.digest)
    facts = {"id": listing.id} | described(listing)
    facts |= {
        "description": listing.description,
        "license": listing.license,
        "reference": str(reference.at(found.descriptor.digest)),
        "signatures": [signature.role for signature in signed],
    }
    if trust:
        offered = candidates(repository, found.descriptor.digest, listing, trust)
        facts["signers"] = signers_of(listing, offered, trust).model_dump()
    manifest = listing.manifest.model_dump(mode="json")
    if isinstance(listing, PackageListing):
        return facts | {"manifest": manifest}
    return facts | {"certified": listing.certificate is not None, "manifest": manifest}


def show(result: dict[str, Any]) -> None:
    from awareness_vllm.cli import inspect

    inspect.show({**result, **result.pop("manifest")})
