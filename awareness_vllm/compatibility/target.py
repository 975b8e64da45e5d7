"""The settings of a target's server that decide whether a memory fits there, and its cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, StrictFloat, StrictInt, StrictStr, ValidationError

from awareness_vllm.errors import BadInput, similar_names
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.passages import BUDGET
from awareness_vllm.schema import FrozenModel
from awareness_vllm.wmatrix.certificate import TAIL

CacheDtype = Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"]

QUANTIZATIONS: dict[str, str | None] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": None,
    "int8": None,
    "int4": None,
    "awq": None,
    "gptq": None,
}
"""Quantizations of weights, and the dtype that each computes in (None: the model's own), which is
also that of vLLM's cache unless `kv_cache_dtype` says otherwise."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


class TargetConfig(FrozenModel):
    """The settings of a target's server; each has a default, and is an option of `awareness check`
    with the same help."""

    quantization: StrictStr | None = Field(
        None, description=f"quantization of the weights: {', '.join(QUANTIZATIONS)}"
    )
    kv_cache_dtype: CacheDtype = Field("auto", description="vLLM's option of that name")
    context_length: StrictInt | None = Field(None, gt=0, description="vLLM's --max-model-len")
    num_gpus: StrictInt = Field(1, gt=0, description="vLLM's --tensor-parallel-size")
    memory_gb: StrictInt | StrictFloat | None = Field(
        None, gt=0, allow_inf_nan=False, description="memory of one device, in 1e9 bytes"
    )
    block_size: StrictInt = Field(
        16, gt=0, description="tokens of a block of the KV cache (128 in vLLM on a CPU)"
    )
    tail: StrictInt = Field(
        TAIL, ge=0, description="last tokens of a memory that the target reads itself"
    )
    reread: StrictInt = Field(
        BUDGET, ge=0, description="tokens that the target re-reads where the question points"
    )
    custom_fine_tune: StrictStr | None = Field(
        None, min_length=1, description="name of a checkpoint with other weights than the target's"
    )

    @classmethod
    def read(cls, config: Mapping[str, Any] | TargetConfig | None) -> TargetConfig:
        """A configuration from the fields that a caller gives.

        Raises:
            BadInput: an unknown field or name, a wrong type or number, or a cache that vLLM does
                not have beside such weights.
        """
        if config is None or isinstance(config, TargetConfig):
            return config or cls()
        if not isinstance(config, Mapping):
            raise BadInput(
                "target_config is not a mapping",
                found=type(config).__name__,
                expected=f"some of {', '.join(cls.model_fields)}",
            )
        for name in config:
            check_name("field of target_config", name, cls.model_fields)
        check_name("quantization", config.get("quantization"), (*QUANTIZATIONS, None))
        check_name("kv_cache_dtype", config.get("kv_cache_dtype", "auto"), get_args(CacheDtype))
        try:
            return cls(**config)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(
                f"{first['loc'][0]} of target_config cannot be used",
                found=repr(first["input"])[:80],
                expected=first["msg"],
            ) from error

    def check(self, geometry: Geometry) -> None:
        """Raises BadInput for settings with which vLLM does not start this model."""
        longest = self.context_length
        if longest is not None and longest > geometry.max_positions:
            raise BadInput(
                f"context_length is beyond the positions of {geometry.name}",
                found=longest,
                expected=f"{geometry.max_positions} at most",
            )
        for heads in sorted({layer.heads for layer in geometry.layers}):
            if heads % self.num_gpus and self.num_gpus % heads:
                raise BadInput(
                    f"num_gpus cannot share out the {heads} KV heads of {geometry.name}",
                    found=self.num_gpus,
                    expected="a divisor of the heads, or a multiple of them (each is replicated)",
                )
        self.check_cache(geometry)

    def check_cache(self, geometry: Geometry) -> None:
        """Raises BadInput for a cache in another dtype than attention can read."""
        computed, cache = self.computed_in(geometry), self.kv_cache_dtype
        wrong = cache in ("float16", "bfloat16") and cache != computed
        if wrong or (self.quantization == "fp8" and cache == "fp8_e5m2"):
            raise BadInput(
                "quantization and kv_cache_dtype contradict each other",
                found=f"{cache} beside {self.quantization or computed} weights",
                expected=f"auto, fp8 or fp8_e4m3; attention computes in {computed}",
            )

    @property
    def rounds(self) -> bool:
        """Whether the cache rounds states more than attention does."""
        return self.kv_cache_dtype.startswith("fp8")

    def computed_in(self, geometry: Geometry) -> str:
        """The dtype that attention computes in; float32 only where it is set, as in vLLM."""
        own = "bfloat16" if geometry.dtype == "float32" else geometry.dtype
        return (self.quantization and QUANTIZATIONS[self.quantization]) or own

    def item_bytes(self, geometry: Geometry) -> int:
        """Bytes of one number in the KV cache."""
        auto = self.kv_cache_dtype == "auto"
        return ITEM_BYTES[self.computed_in(geometry) if auto else self.kv_cache_dtype]


def check_name(what: str, name: object, names: Iterable[object]) -> None:
    """Raises BadInput for a name that is none of `names`; the error suggests similar ones."""
    names = list(names)
    if name in names:
        return
    words = [known for known in names if isinstance(known, str)]
    near = similar_names(name, words)
    raise BadInput(
        f"unknown {what}",
        found=repr(name)[:80],
        expected=", ".join(words),
        remedy=f"did you mean {' or '.join(near)}?" if near else None,
    )
