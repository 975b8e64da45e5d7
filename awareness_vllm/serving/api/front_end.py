"""The parts of a server's front end, made from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from awareness_vllm.compatibility.target import QUANTIZATIONS, CacheDtype, TargetConfig
from awareness_vllm.serving.admission import Admission
from awareness_vllm.serving.api.canary import Canary
from awareness_vllm.serving.api.editions import Editions
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.api.passages import Passages
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.http import FrontEnd
from awareness_vllm.serving.offline_capture import state_bytes
from awareness_vllm.serving.pulls import Pulls
from awareness_vllm.serving.registry import registry_memories
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.storage import CaptureLimits
from awareness_vllm.serving.tenants import Tenants

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient


def build_front_end(config: ServingConfig, engine: EngineClient) -> FrontEnd:
    """The front end's parts from the configuration. Raises BadInput, WMatrixCorrupt."""
    model = ServedModel.of(engine.vllm_config)
    resolver = MemoryResolver.from_config(config, model)
    client = MemoryEngineClient(engine, passages_of(config, engine, model))
    pulls = pulls_of(config, resolver)
    return FrontEnd(
        resolver=resolver,
        tenants=Tenants.read(config.tenants),
        engine_client=client,
        canary=Canary(client),
        target=target_config(engine.vllm_config, model, config.tail),
        admission=Admission(
            resolver.stores, client.loaded, config.max_loads, config.max_load_bytes, pulls
        ),
        capture_limits=CaptureLimits.from_config(config),
        editions=Editions.from_config(config, engine.vllm_config, model, client),
    )


def pulls_of(config: ServingConfig, resolver: MemoryResolver) -> Pulls | None:
    """The pulls from the server's registry, if it has one. Raises BadInput."""
    if (registry := registry_memories(config, resolver.trust)) is None:
        return None
    return Pulls(registry, resolver.check_listing, config.load_timeout)


def passages_of(config: ServingConfig, engine: EngineClient, model: ServedModel) -> Passages:
    """The passages that the workers keep within their bound: half of them are counted on, so that
    none is dropped there first."""
    size = 2 * state_bytes(model.geometry, 1, model.dtype)
    limit = int(config.reread_cache_gib * 2**30) // size
    return Passages(engine, limit, min(config.reread_timeout, config.load_timeout))


def target_config(vllm_config: VllmConfig, model: ServedModel, tail: int) -> TargetConfig:
    """How this server serves its model, for reports about memories."""
    cache = vllm_config.cache_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return TargetConfig(
        quantization=next((name for name, d in QUANTIZATIONS.items() if d == dtype), None),
        # For names that TargetConfig does not have, the model's own dtype is the nearest.
        kv_cache_dtype=cache.cache_dtype if cache.cache_dtype in get_args(CacheDtype) else "auto",
        context_length=model.max_model_len,
        num_gpus=vllm_config.parallel_config.tensor_parallel_size,
        block_size=cache.block_size,
        tail=tail,
    )
