"""`awareness list`: the memory packages of a store."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from awareness_vllm.cli.options import add_trust

HELP = "list the memory packages of a store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, help="folder (default: $AWARENESS_HOME/store)")
    add_trust(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.errors import AwarenessError
    from awareness_vllm.files import default_store
    from awareness_vllm.packages.manifest import read_manifest, signer_of
    from awareness_vllm.packages.store import Store
    from awareness_vllm.trust.policy import TrustPolicy

    trust = TrustPolicy.read(args.trust)
    store = Store(args.store or default_store())
    memories: list[dict[str, Any]] = []
    for memory_id in store.ids():
        row: dict[str, Any] = {"id": memory_id, "bytes": None, "latent_of": None}
        try:
            path = store.path(memory_id)
            row["bytes"] = path.stat().st_size
            manifest = read_manifest(path)
            row |= {"name": manifest.name, "tokens": manifest.tokens, "engine": manifest.engine}
            row |= {"source": manifest.geometry.name, "edition_of": manifest.edition_of}
            latent = manifest.latent
            row |= {"latent_of": latent.package, "target": latent.target.name} if latent else {}
            row["error"] = None
            if trust:
                row["signed_by"] = signer_of(path, trust)
        except (AwarenessError, OSError) as error:
            row["error"] = str(error)
        memories.append(row)
    return {"store": str(store.folder), "memories": memories}


def show(result: dict[str, Any]) -> None:
    for row in result["memories"]:
        what = row["error"] or f"{row['tokens']} tokens of {row['source']}  {row['name'] or ''}"
        signed = f"  signed by {row['signed_by']}" if row.get("signed_by") else ""
        edition = f"  edition of {row['edition_of']}" if row.get("edition_of") else ""
        latent = f"  latent for {row['target']}" if row.get("latent_of") else ""
        print(f"{row['id']}  {what}{edition}{latent}{signed}")
    print(f"{len(result['memories'])} memories in {result['store']}")
