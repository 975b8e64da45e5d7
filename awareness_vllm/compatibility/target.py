"""How a target is served, as far as it decides whether a memory fits there and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, StrictFloat, StrictInt, StrictStr, ValidationError

from awareness_vllm.errors import BadInput, similar_names
from awareness_vllm.models.geometry import Geometry
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
"""What is known of weights, and the dtype that each computes in; None: the model's own. However few
bits the weights have, vLLM's cache is in that dtype unless `kv_cache_dtype` says otherwise."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


class TargetConfig(FrozenModel):
    """What a target's server is started with; every field may be left out.

    `quantization` is that of the weights, a key of QUANTIZATIONS. `kv_cache_dtype` has vLLM's
    names. `context_length` is vLLM's `--max-model-len`, `num_gpus` its tensor parallelism,
    `memory_gb` one device's memory in 1e9 bytes, `block_size` the tokens of a block of the KV cache
    (vLLM on a CPU takes 128). The target reads the last `tail` tokens of a memory itself.
    `custom_fine_tune` names a checkpoint whose weights are not the target's own.
    """

    quantization: StrictStr | None = None
    kv_cache_dtype: CacheDtype = "auto"
    context_length: StrictInt | None = Field(None, gt=0)
    num_gpus: StrictInt = Field(1, gt=0)
    memory_gb: StrictInt | StrictFloat | None = Field(None, gt=0, allow_inf_nan=False)
    block_size: StrictInt = Field(16, gt=0)
    tail: StrictInt = Field(TAIL, ge=0)
    custom_fine_tune: StrictStr | None = Field(None, min_length=1)

    @classmethod
    def read(cls, given: Mapping[str, Any] | TargetConfig | None) -> TargetConfig:
        """A configuration as a caller gives it.

        Raises:
            BadInput: an unknown field or name, a wrong type or number, or a cache that vLLM does
                not have beside such weights.
        """
        if given is None or isinstance(given, TargetConfig):
            return given or cls()
        if not isinstance(given, Mapping):
            raise BadInput(
                "target_config is not a mapping",
                found=type(given).__name__,
                expected=f"some of {', '.join(cls.model_fields)}",
            )
        for name in given:
            known("field of target_config", name, cls.model_fields)
        known("quantization", given.get("quantization"), (*QUANTIZATIONS, None))
        known("kv_cache_dtype", given.get("kv_cache_dtype", "auto"), get_args(CacheDtype))
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(
                f"{first['loc'][0]} of target_config cannot be used",
                found=repr(first["input"])[:80],
                expected=first["msg"],
            ) from error

    def check(self, geometry: Geometry) -> None:
        """Refuse what vLLM would refuse to start with this model.

        Raises:
            BadInput
        """
        longest = self.context_length
        if longest is not None and longest > geometry.max_positions:
            raise BadInput(
                f"context_length is beyond what {geometry.name} was made for",
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
        """Refuse a cache in another dtype than attention can read. Raises BadInput."""
        computed, cache = self.computed_in(geometry), self.kv_cache_dtype
        wrong = cache in ("float16", "bfloat16") and cache != computed
        if wrong or (self.quantization == "fp8" and cache == "fp8_e5m2"):
            raise BadInput(
                "quantization and kv_cache_dtype contradict each other",
                found=f"{cache} beside {self.quantization or computed} weights",
                expected=f"auto, fp8 or fp8_e4m3; attention computes in {computed}",
            )

    def computed_in(self, geometry: Geometry) -> str:
        """The dtype that attention computes in; unless it is asked to, vLLM does not in float32."""
        own = "bfloat16" if geometry.dtype == "float32" else geometry.dtype
        return (self.quantization and QUANTIZATIONS[self.quantization]) or own

    def item_bytes(self, geometry: Geometry) -> int:
        """Bytes of one number in the KV cache."""
        auto = self.kv_cache_dtype == "auto"
        return ITEM_BYTES[self.computed_in(geometry) if auto else self.kv_cache_dtype]


def known(what: str, found: object, names: Iterable[object]) -> None:
    """Refuse what is none of the names; those nearest to it are named. Raises BadInput."""
    names = list(names)
    if found in names:
        return
    words = [name for name in names if isinstance(name, str)]
    near = similar_names(found, words)
    raise BadInput(
        f"unknown {what}",
        found=repr(found)[:80],
        expected=", ".join(words),
        remedy=f"did you mean {' or '.join(near)}?" if near else None,
    )
