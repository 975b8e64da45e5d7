"""A server's options: the `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from awareness_vllm.errors import BadInput
from awareness_vllm.passages import BUDGET
from awareness_vllm.schema import FrozenModel
from awareness_vllm.wmatrix.certificate import TAIL

CONNECTOR = "AwarenessConnector"
CONNECTOR_MODULE = "awareness_vllm.serving.connector"
WORKER_EXTENSION = "awareness_vllm.serving.connector.worker_extension.AwarenessWorkerExtension"
PARAMS_KEY = "awareness"
"""Our key in a request's `kv_transfer_params`."""


class ServingConfig(FrozenModel):
    """A server's options and their defaults; the command line takes both from here."""

    store: str = Field(description="folder of memory packages")
    wmatrices: tuple[str, ...] = Field(
        (), description="W-Matrix files; oci://HOST/REPOSITORY:TAG ones are pulled at start"
    )
    tail: int = Field(
        TAIL,
        ge=0,
        description="last tokens of a realigned memory that the model reads itself: more fidelity, "
        "more time; the certificate says what each is worth",
    )
    host_cache_gib: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="GiB of host memory for aligned memories"
    )
    disk_cache: str | None = Field(
        None, description="folder for aligned memories, read instead of aligned again"
    )
    disk_cache_gib: float = Field(
        10.0, ge=0, allow_inf_nan=False, description="GiB of aligned memories in disk_cache"
    )
    reread: int = Field(
        BUDGET,
        ge=0,
        description="tokens of each memory, of those that the question points at, which the model "
        "reads itself, in place; 0 for none, unless a request asks for some",
    )
    quote: int = Field(
        BUDGET,
        ge=0,
        description="tokens of each memory, of those that the question points at, which stand once "
        "more before a prompt with a question mark; 0 for none, unless a request asks for some",
    )
    reread_timeout: float = Field(
        5.0, gt=0, description="seconds; passages that are not re-read by then stay aligned"
    )
    reread_cache_gib: float = Field(
        0.5, gt=0, allow_inf_nan=False, description="GiB of host memory for re-read passages"
    )
    editions: Literal["never", "idle", "always"] = Field(
        "idle",
        description="when the model reads used memories through to the end, so that they are exact "
        "from then on: never, while no request is being answered, or also beside requests",
    )
    edition_after: int = Field(
        1, ge=1, description="uses of a memory after which its edition is made"
    )
    edition_gib: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="GiB of host memory for editions"
    )
    load_timeout: float = Field(
        60.0, gt=0, description="seconds; a memory that is not aligned by then is read natively"
    )
    tenants: str | None = Field(
        None, description="JSON file of tenants with API keys and a store each"
    )
    trust: str | None = Field(
        None,
        description="JSON file of the public keys whose signatures count, and for what; with it, "
        "unsigned W-Matrices are refused",
    )
    require_signed: Literal["none", "wmatrix", "all"] | None = Field(
        None,
        description="what must be signed by a key of the trust file: nothing, W-Matrices, or "
        "packages too, but for those captured here (default: wmatrix with a trust file)",
    )
    registry: str | None = Field(
        None,
        description="oci://HOST/REPOSITORY, or a layout folder: memories that a store lacks are "
        "looked up and pulled from there, for every tenant",
    )
    registry_cache_gib: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="GiB of disk for memories that were pulled"
    )
    pin: tuple[str, ...] = Field((), description="memories to keep warm from the start")
    max_loads: int = Field(
        32, ge=1, description="cold memories that are loaded at once; beyond, 429 with Retry-After"
    )
    max_load_gib: float = Field(
        4.0,
        gt=0,
        allow_inf_nan=False,
        description="GiB of packages that are loaded at once; a larger package is refused",
    )
    allow_capture: bool = Field(
        False, description="let requests publish their prompts as memories in their tenant's store"
    )
    capture_quota_gib: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="GiB up to which captures may fill a tenant's store",
    )
    min_free_gib: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="GiB of disk that captures leave free"
    )

    @property
    def max_load_bytes(self) -> int:
        return int(self.max_load_gib * 2**30)

    @property
    def signed(self) -> Literal["none", "wmatrix", "all"]:
        """What must be signed."""
        return self.require_signed or ("wmatrix" if self.trust else "none")

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> ServingConfig:
        """Raises BadInput when an option is missing, unknown, of the wrong type or out of range."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        name = first["loc"][0] if first["loc"] else "kv_connector_extra_config"
        raise BadInput(
            f"the serving option {name} cannot be used",
            found="nothing" if first["type"] == "missing" else repr(first["input"])[:80],
            expected=first["msg"]
            if name in cls.model_fields
            else f"some of {', '.join(cls.model_fields)}",
            remedy="`awareness serve --help` describes the options; by hand they stand in "
            "kv_connector_extra_config",
        )


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
