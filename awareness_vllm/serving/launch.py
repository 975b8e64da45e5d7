"""The command and environment with which vLLM's own server runs with memories."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from awareness_vllm.errors import BadInput
from awareness_vllm.files import default_store
from awareness_vllm.models.folder import is_model_folder
from awareness_vllm.packages.manifest import check_id
from awareness_vllm.serving.config import WORKER_EXTENSION, ServingConfig, transfer_config
from awareness_vllm.serving.registry import absolute_registry
from awareness_vllm.serving.remote_maps import local_map
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tenants import Tenants
from awareness_vllm.serving.trust import trust_of, trusted_maps
from awareness_vllm.trust.policy import TrustPolicy

PLUGIN = "awareness"
LOADED_BY_DEFAULT = tuple(
    f"vllm.{group}_plugins" for group in ("general", "platform", "io_processor", "stat_logger")
)
"""Plugin groups whose entries vLLM loads while `VLLM_PLUGINS` is unset."""
SERVER = "awareness_vllm.serving.server"
COMPOSED_FLAGS = ("--kv-transfer-config", "--worker-extension-cls", "--model")


def serving_config(
    store: Path | None = None,
    wmatrices: Sequence[str | Path] = (),
    *,
    tenants: Path | None = None,
    trust: Path | None = None,
    disk_cache: Path | None = None,
    registry: str | None = None,
    pin: Sequence[str] = (),
    **options: float | str | None,
) -> ServingConfig:
    """A server's configuration with absolute paths; an option that is None has its default. Maps
    that `oci://` references name are pulled.

    Raises:
        BadInput: a missing W-Matrix file, a tenants or trust file that cannot be used, or an option
            that is out of range.
        InvalidMemoryId: a memory to pin that cannot be one.
        WMatrixCorrupt, SignatureInvalid: with a trust file, a W-Matrix that cannot be used.
        ArtefactNotFound, ArtefactCorrupt, RegistryError: of a map in a registry.
    """
    policy = TrustPolicy.read(trust)
    paths = [local_map(wmatrix, policy) for wmatrix in wmatrices]
    Tenants.read(tenants)
    for memory in pin:
        check_id(memory)
    fields = {
        "store": _absolute(store or default_store()),
        # Not resolved: a signature lies beside the link that the operator names.
        "wmatrices": tuple(os.path.abspath(path.expanduser()) for path in paths),
        "tenants": _absolute(tenants),
        "trust": _absolute(trust),
        "disk_cache": _absolute(disk_cache),
        "registry": None if registry is None else absolute_registry(registry),
        "pin": tuple(pin),
        **options,
    }
    config = ServingConfig.parse({name: v for name, v in fields.items() if v is not None})
    if policy := trust_of(config):
        trusted_maps(config, policy)  # now, not after a minute of vLLM's start
    return config


def _absolute(path: Path | None) -> str | None:
    return str(path.expanduser().resolve()) if path else None


def check_model(model: str) -> None:
    """Read of a model's folder what the server will read of it. A model's name is left to vLLM,
    which may download it.

    Raises:
        UnsupportedModel
    """
    if is_model_folder(model):
        ServedModel.read(model, max_model_len=0)  # vLLM fails on such files without naming them


def command(model: str, config: ServingConfig, flags: Sequence[str] = ()) -> list[str]:
    """The argv of a vLLM server with memories.

    Raises:
        BadInput: a flag that this command composes itself.
    """
    for flag in flags:
        # vLLM also takes `--kv-transfer-config.kv_role VALUE`.
        name = flag.split("=")[0].split(".")[0].replace("_", "-")
        if name in COMPOSED_FLAGS:
            raise BadInput(
                f"{name} is composed by `awareness serve`",
                found=flag,
                expected="any other vllm serve flag",
                remedy="use `vllm serve` itself to set it by hand (see docs/serving.md)",
            )
    return [
        sys.executable,
        "-m",
        SERVER,
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
