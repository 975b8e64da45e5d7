"""`awareness inspect`: the manifest of a memory package or of a W-Matrix."""

from __future__ import annotations

import argparse
import json
from typing import Any

from awareness_vllm.cli.options import add_what

HELP = "print the manifest of a memory package or a W-Matrix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_what(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.packages.manifest import read_manifest
    from awareness_vllm.packages.store import locate
    from awareness_vllm.wmatrix.manifest import read_manifest as read_wmatrix_manifest

    path = locate(args.what, args.store)
    if path.suffix == ".wmatrix":
        manifest = read_wmatrix_manifest(path)
        certified = manifest.measured is not None
        return {"kind": "wmatrix", "certified": certified, **manifest.model_dump(mode="json")}
    return {"kind": "memory", "id": path.stem, **read_manifest(path).model_dump(mode="json")}


def show(result: dict[str, Any]) -> None:
    for geometry in ("geometry", "source", "target"):
        if geometry in result:
            result[geometry]["layers"] = f"{len(result[geometry]['layers'])} layers"
    certificate = result.pop("certificate", None)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    if result["kind"] == "wmatrix":
        from awareness_vllm.cli.format import lines

        print("\n".join(lines(certificate)) if result["certified"] else "not certified")
