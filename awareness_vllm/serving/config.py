"""What an operator configures: the `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from awareness_vllm.errors import BadInput
from awareness_vllm.schema import FrozenModel
from awareness_vllm.wmatrix.certificate import TAIL

CONNECTOR = "AwarenessConnector"
CONNECTOR_MODULE = "awareness_vllm.serving.connector"
WORKER_EXTENSION = "awareness_vllm.serving.connector.worker_extension.AwarenessWorkerExtension"
PARAMS_KEY = "awareness"
"""Our key in a request's `kv_transfer_params`."""


class ServingConfig(FrozenModel):
    """`store` is a folder of packages, `wmatrices` are files; the target reads the last `tail`
    tokens of a realigned memory itself; aligned memories of up to `host_cache_gib` GiB stay warm in
    host memory, `pin` of them from the start, and of up to `disk_cache_gib` in the folder
    `disk_cache`; a request whose memory is not aligned after `load_timeout` seconds reads it
    natively; `tenants` is a file that gives each tenant keys and a store of its own. An offline
    engine with `capture` reads back whatever is asked for."""

    store: str
    wmatrices: tuple[str, ...] = ()
    tail: int = Field(TAIL, ge=0)
    host_cache_gib: float = Field(1.0, ge=0)
    disk_cache: str | None = None
    disk_cache_gib: float = Field(10.0, ge=0)
    load_timeout: float = Field(60.0, gt=0)
    tenants: str | None = None
    pin: tuple[str, ...] = ()
    capture: bool = False

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> ServingConfig:
        """Raises BadInput when a field is missing, unknown or of the wrong type."""
        try:
            return cls.model_validate(extra)
        except ValidationError as error:
            raise BadInput(
                "kv_connector_extra_config is not usable",
                found=str(error),
                expected=", ".join(cls.model_fields),
                remedy="start the server with `awareness serve`, which composes it",
            ) from error


def transfer_config(config: ServingConfig) -> dict[str, Any]:
    """vLLM's `--kv-transfer-config` for our connector.

    A load that fails recomputes: the prompt's ids are the memory's own text, so prefill is right.
    """
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": config.model_dump(mode="json"),
    }
