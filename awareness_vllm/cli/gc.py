"""`awareness gc`: remove from the cache what was not used for the longest."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "make the cache of pulled files smaller"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit-gib",
        type=float,
        help="what may stay; 0: nothing (default: $AWARENESS_CACHE_GIB, or 20)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from awareness_vllm.errors import BadInput
    from awareness_vllm.oci.cache import Cache, caches, default_limit

    limit = default_limit() if args.limit_gib is None else args.limit_gib * 2**30
    if not 0 <= limit < 1 << 60:
        raise BadInput("--limit-gib cannot be used", found=args.limit_gib, expected="GiB")
    collected = [(cache, Cache(cache, int(limit)).collect()) for cache in caches()]
    return {"limit": int(limit), "caches": [{"path": str(p)} | asdict(c) for p, c in collected]}


def show(result: dict[str, Any]) -> None:
    for cache in result["caches"]:
        print(
            f"{cache['path']}: {cache['removed']} files removed ({_gib(cache['freed'])}), "
            f"{cache['kept']} stay ({_gib(cache['bytes'])})"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
