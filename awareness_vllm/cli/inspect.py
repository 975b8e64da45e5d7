"""`awareness inspect`: the manifest of a memory package or of a W-Matrix."""

from __future__ import annotations

import argparse
import json
from typing import Any

from awareness_vllm.cli.options import add_trust, add_what

HELP = "print the manifest of a memory package or a W-Matrix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_what(parser)
    add_trust(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.packages.manifest import read_manifest, signer_of
    from awareness_vllm.packages.store import locate
    from awareness_vllm.trust.policy import TrustPolicy
    from awareness_vllm.wmatrix.manifest import read_manifest as read_wmatrix_manifest
    from awareness_vllm.wmatrix.registry import WMatrixEntry

    trust = TrustPolicy.read(args.trust)
    signers: dict[str, str | None] = {}
    path = locate(args.what, args.store)
    if path.suffix != ".wmatrix":
        manifest = read_manifest(path).model_dump(mode="json")
        if trust:
            signers = {"signed_by": signer_of(path, trust)}
        return {"kind": "memory", "id": path.stem, **signers, **manifest}
    if trust:
        entry = WMatrixEntry.read(path, trust)
        signers = {
            "signed_by": entry.signed_by,
            "certificate_signed_by": entry.certificate_signed_by,
        }
    map_manifest = read_wmatrix_manifest(path)
    certified = map_manifest.measured is not None
    document = map_manifest.model_dump(mode="json")
    return {"kind": "wmatrix", "certified": certified, **signers, **document}


def show(result: dict[str, Any]) -> None:
    for geometry in ("geometry", "source", "target"):
        if geometry in result:
            result[geometry]["layers"] = f"{len(result[geometry]['layers'])} layers"
    certificate = result.pop("certificate", None)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    if result["kind"] == "wmatrix":
        from awareness_vllm.cli.format import lines

        print("\n".join(lines(certificate)) if result["certified"] else "not certified")
