"""`awareness verify`: check that a memory package or a W-Matrix is whole and unaltered."""

from __future__ import annotations

import argparse
from typing import Any

from awareness_vllm.cli.inspect import add_arguments

__all__ = ["HELP", "add_arguments", "run", "show"]

HELP = "check that a memory package or a W-Matrix is whole and unaltered"


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.files import file_digest
    from awareness_vllm.packages.file import read_index, verify
    from awareness_vllm.packages.manifest import MEMORY_ID, id_of
    from awareness_vllm.packages.store import digest_in, locate
    from awareness_vllm.wmatrix.file import load

    path = locate(args.what, args.store)
    if path.suffix == ".wmatrix":
        load(path)
        return {"ok": True, "kind": "wmatrix", "path": str(path), "digest": file_digest(path)}
    named = MEMORY_ID.fullmatch(path.stem)
    digest = read_index(path, digest=digest_in(path.stem) if named else None).digest
    verify(path)
    return {"ok": True, "kind": "memory", "path": str(path), "id": id_of(digest)}


def show(result: dict[str, Any]) -> None:
    print(f"ok  {result.get('id') or result['digest']}  {result['path']}")
