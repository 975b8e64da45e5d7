"""`awareness serve`: become vLLM's own server, with memories."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from awareness_vllm.serving.config import ServingConfig

HELP = "serve a model with memories; takes every flag of vllm serve"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(flag: str, field: str, **kwargs: Any) -> None:
        """A flag for a field of the server's configuration, with its description and default."""
        info = ServingConfig.model_fields[field]
        suffix = ""
        if not info.is_required() and info.default:
            value = info.default if isinstance(info.default, str) else f"{info.default:g}"
            suffix = f" (default: {value})"
        parser.add_argument(flag, help=f"{info.description}{suffix}", **kwargs)

    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    option("--store", "store", type=Path, metavar="DIR")
    option("--wmatrix", "wmatrices", metavar="FILE", **several)
    option("--registry", "registry", metavar="REGISTRY")
    option("--registry-cache-gib", "registry_cache_gib", type=float, metavar="GIB")
    option("--tail", "tail", type=int, metavar="N")
    option("--tenants", "tenants", type=Path, metavar="FILE")
    option("--trust", "trust", type=Path, metavar="FILE")
    option("--require-signed", "require_signed", choices=["none", "wmatrix", "all"])
    option("--pin", "pin", metavar="ID", **several)
    option("--host-cache-gib", "host_cache_gib", type=float, metavar="GIB")
    option("--disk-cache", "disk_cache", type=Path, metavar="DIR")
    option("--reread", "reread", type=int, metavar="N")
    option("--quote", "quote", type=int, metavar="N")
    option("--reread-timeout", "reread_timeout", type=float, metavar="SECONDS")
    option("--reread-cache-gib", "reread_cache_gib", type=float, metavar="GIB")
    option("--editions", "editions", choices=["never", "idle", "always"])
    option("--edition-after", "edition_after", type=int, metavar="N")
    option("--edition-gib", "edition_gib", type=float, metavar="GIB")
    option("--load-timeout", "load_timeout", type=float, metavar="SECONDS")
    option("--max-loads", "max_loads", type=int, metavar="N")
    option("--max-load-gib", "max_load_gib", type=float, metavar="GIB")
    option("--allow-capture", "allow_capture", action="store_true")
    option("--capture-quota-gib", "capture_quota_gib", type=float, metavar="GIB")
    option("--min-free-gib", "min_free_gib", type=float, metavar="GIB")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.serving.launch import check_model, command, serving_config
    from awareness_vllm.serving.plugin import register
    from awareness_vllm.serving.remote_maps import with_registry_maps

    register()
    config = serving_config(
        args.store,
        args.wmatrix,
        tail=args.tail,
        tenants=args.tenants,
        trust=args.trust,
        require_signed=args.require_signed,
        pin=args.pin,
        host_cache_gib=args.host_cache_gib,
        disk_cache=args.disk_cache,
        registry=args.registry,
        registry_cache_gib=args.registry_cache_gib,
        reread=args.reread,
        quote=args.quote,
        reread_timeout=args.reread_timeout,
        reread_cache_gib=args.reread_cache_gib,
        editions=args.editions,
        edition_after=args.edition_after,
        edition_gib=args.edition_gib,
        load_timeout=args.load_timeout,
        max_loads=args.max_loads,
        max_load_gib=args.max_load_gib,
        allow_capture=args.allow_capture,
        capture_quota_gib=args.capture_quota_gib,
        min_free_gib=args.min_free_gib,
    )
    check_model(args.model)
    config = with_registry_maps(config, args.model)
    return {"argv": command(args.model, config, args.flags)}


def show(result: dict[str, Any]) -> None:
    print(shlex.join(result["argv"]))


def after(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from awareness_vllm.serving.launch import become

    become(result["argv"], quiet_stdout=args.json)
