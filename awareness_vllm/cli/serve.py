"""`awareness serve`: become vLLM's own server, with memories."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

HELP = "serve a model with memories; takes every flag of vllm serve"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder")
    parser.add_argument("--store", type=Path, help="folder of memory packages")
    parser.add_argument(
        "--wmatrix", nargs="+", action="extend", default=[], type=Path, metavar="FILE"
    )
    parser.add_argument(
        "--tail",
        type=int,
        metavar="N",
        help="last tokens of a realigned memory that the model reads itself: more fidelity, more "
        "time (default: 16; the certificate says what each is worth)",
    )
    parser.add_argument(
        "--tenants",
        type=Path,
        metavar="FILE",
        help="JSON: who has which API keys and which store (default: one tenant, --store)",
    )
    parser.add_argument(
        "--pin", nargs="+", action="extend", default=[], metavar="ID", help="memories to keep warm"
    )
    parser.add_argument(
        "--host-cache-gib",
        type=float,
        metavar="GIB",
        help="host memory for aligned memories (default: 1)",
    )
    parser.add_argument(
        "--disk-cache",
        type=Path,
        metavar="DIR",
        help="folder for up to 10 GiB of aligned memories, read instead of aligned again",
    )
    parser.add_argument(
        "--load-timeout",
        type=float,
        metavar="SECONDS",
        help="a memory that is not aligned by then is read natively (default: 60)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.serving.launch import command
    from awareness_vllm.serving.plugin import register

    register()
    argv = command(
        args.model,
        args.store,
        args.wmatrix,
        args.flags,
        tail=args.tail,
        tenants=args.tenants,
        pin=args.pin,
        host_cache_gib=args.host_cache_gib,
        disk_cache=args.disk_cache,
        load_timeout=args.load_timeout,
    )
    return {"argv": argv}


def show(result: dict[str, Any]) -> None:
    print(shlex.join(result["argv"]))


def after(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from awareness_vllm.serving.launch import become

    become(result["argv"], quiet_stdout=args.json)
