"""Compose the command and environment with which vLLM's own server runs with memories."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from awareness_vllm.errors import BadInput
from awareness_vllm.files import default_store
from awareness_vllm.packages.manifest import check_id
from awareness_vllm.serving.config import WORKER_EXTENSION, ServingConfig, transfer_config
from awareness_vllm.serving.tenants import Tenants

PLUGIN = "awareness"
LOADED_BY_DEFAULT = tuple(
    f"vllm.{group}_plugins" for group in ("general", "platform", "io_processor", "stat_logger")
)
"""Plugin groups whose entries vLLM loads while `VLLM_PLUGINS` is unset."""


def command(
    model: str,
    store: Path | None,
    wmatrices: Sequence[Path],
    flags: Sequence[str],
    *,
    tail: int | None = None,
    tenants: Path | None = None,
    pin: Sequence[str] = (),
    host_cache_gib: float | None = None,
    disk_cache: Path | None = None,
    load_timeout: float | None = None,
) -> list[str]:
    """The argv of a vLLM server with memories.

    `python -m …api_server` instead of `vllm serve`: the console script asks for a distribution
    named `vllm`, which the CPU build is not.

    Raises:
        BadInput: a W-Matrix file that is not there, a tenants file that cannot be used, a negative
            number, or a flag that this command composes itself.
        InvalidMemoryId: a memory to pin that cannot be one.
    """
    for path in wmatrices:
        if not path.is_file():
            raise BadInput(
                "no such W-Matrix",
                found=str(path),
                expected="a .wmatrix file",
                remedy="`awareness fit`",
            )
    if tail is not None and tail < 0:
        raise BadInput("not a number of tokens", found=tail, expected="--tail 0 or more")
    if host_cache_gib is not None and host_cache_gib < 0:
        raise BadInput("not a size", found=host_cache_gib, expected="--host-cache-gib 0 or more")
    if load_timeout is not None and not load_timeout > 0:
        raise BadInput("not a time", found=load_timeout, expected="--load-timeout more than 0")
    Tenants.read(tenants)
    for memory in pin:
        check_id(memory)
    for flag in flags:
        # vLLM also takes `--kv-transfer-config.kv_role VALUE`.
        name = flag.split("=")[0].split(".")[0].replace("_", "-")
        if name in ("--kv-transfer-config", "--worker-extension-cls", "--model"):
            raise BadInput(
                f"{name} is composed by `awareness serve`",
                found=flag,
                expected="any other vllm serve flag",
                remedy="use `vllm serve` itself to set it by hand (see docs/serving.md)",
            )
    config = ServingConfig(
        store=str((store or default_store()).expanduser().resolve()),
        wmatrices=tuple(str(path.resolve()) for path in wmatrices),
        tenants=str(tenants.resolve()) if tenants else None,
        pin=tuple(pin),
        disk_cache=str(disk_cache.expanduser().resolve()) if disk_cache else None,
        **({} if tail is None else {"tail": tail}),
        **({} if host_cache_gib is None else {"host_cache_gib": host_cache_gib}),
        **({} if load_timeout is None else {"load_timeout": load_timeout}),
    )
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--kv-transfer-config",
        json.dumps(transfer_config(config)),
        "--worker-extension-cls",
        WORKER_EXTENSION,
        *flags,
    ]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with our endpoint plugin allowed.

    `VLLM_PLUGINS` is an allow-list over all plugin groups: setting it must not switch off the
    plugins that load when it is unset.
    """
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is None:
        names = {
            entry.name
            for group in LOADED_BY_DEFAULT
            for entry in importlib.metadata.entry_points(group=group)
        }
    else:
        names = {name for name in allowed.split(",") if name}
    return {**environ, "VLLM_PLUGINS": ",".join(sorted(names | {PLUGIN}))}


def become(argv: list[str], *, quiet_stdout: bool = False) -> None:
    """Replace this process by vLLM's server; with `quiet_stdout` its log goes to stderr."""
    sys.stdout.flush()
    if quiet_stdout:
        os.dup2(2, 1)
    os.execvpe(argv[0], argv, environment(os.environ))
