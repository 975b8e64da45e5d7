"""vLLM's requests, blocks and scheduler outputs, as far as the connector looks at them, and a
connector without an engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorRole,
    KVConnectorTransferResults,
)

from awareness_vllm.packages.store import digest_in
from awareness_vllm.serving.config import ServingConfig, transfer_config
from awareness_vllm.serving.connector.connector import AwarenessConnector
from awareness_vllm.serving.connector.kv_layout import NULL_BLOCK
from awareness_vllm.serving.connector.scheduler import ConnectorMetadata, LoadSpec, SaveSpec
from awareness_vllm.serving.connector.worker import Loaded
from awareness_vllm.serving.params import LoadParams, Part, kv_transfer_params

MEMORY = "mem_" + "0" * 32
BLOCK_SIZE = 16


def plan_with(
    memory: str = MEMORY, wmatrix: str = "", *, tokens: int = 1, tail: int = 0, salt: str = ""
) -> LoadParams:
    """The load plan of a request with one memory."""
    part = Part(memory=memory, digest=digest_in(memory) or "none", wmatrix=wmatrix, tokens=tokens)
    return LoadParams(parts=(part,), tail=tail, caller_salt=salt)


def request(
    tokens: int = 40,
    *,
    memory: int = 20,
    tail: int = 0,
    name: str = "r",
    salt: str | None = None,
    computed: int = 0,
) -> Any:
    """vLLM's `Request` for a prompt of `tokens` ids, `memory` of them a memory's."""
    params = plan_with(tokens=memory, tail=tail)
    return SimpleNamespace(
        request_id=name,
        num_tokens=tokens,
        num_computed_tokens=computed,
        prompt_token_ids=list(range(tokens)),
        cache_salt=salt or params.cache_salt,
        kv_transfer_params=kv_transfer_params(params),
    )


def plain_request() -> Any:
    """A request without memories."""
    plain = request(computed=40)
    plain.kv_transfer_params = plain.cache_salt = None
    return plain


def blocks(*groups: list[int]) -> Any:
    """vLLM's `KVCacheBlocks`; NULL_BLOCK makes a null block, whose ID in vLLM is 0."""
    return SimpleNamespace(
        blocks=tuple(
            [SimpleNamespace(is_null=b == NULL_BLOCK, block_id=max(b, 0)) for b in group]
            for group in groups
        )
    )


def scheduled(
    params: object, *, computed: int = 0, step: int = 5, tokens: int = 5, ids: Any = ([2, 3],)
) -> Any:
    """vLLM's `SchedulerOutput` with a new request."""
    new = SimpleNamespace(
        req_id="r",
        prompt_token_ids=list(range(tokens)),
        sampling_params=SimpleNamespace(extra_args={"kv_transfer_params": params}),
        num_computed_tokens=computed,
        block_ids=ids,
    )
    return SimpleNamespace(
        scheduled_new_reqs=[new],
        scheduled_cached_reqs=cached(),
        num_scheduled_tokens={"r": step},
        total_num_scheduled_tokens=step,
    )


def later(step: int, *names: str, **fields: Any) -> Any:
    """vLLM's `SchedulerOutput` with requests that were scheduled before."""
    return SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached(*names, **fields),
        num_scheduled_tokens=dict.fromkeys(names, step),
        total_num_scheduled_tokens=step * len(names),
    )


def cached(*names: str, ids: Any = None, computed: int = 0, resumed: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        req_ids=list(names),
        new_block_ids=[ids] * len(names),
        num_computed_tokens=[computed] * len(names),
        resumed_req_ids=set(resumed),
    )


class StubWorker:
    """Finishes loads in the step that begins them; a request named "slow" goes on waiting."""

    def __init__(self, finish: Callable[[LoadSpec], Loaded]) -> None:
        self.pending: dict[str, LoadSpec] = {}
        self.idle: list[bool] = []
        self.load = finish
        self.editions = SimpleNamespace(take_counts=dict)

    def begin(self, load: LoadSpec) -> None:
        self.pending[load.request_id] = load

    def ready(self, *, idle: bool) -> list[str]:
        self.idle.append(idle)
        return [name for name in self.pending if name != "slow"]

    def finish(self, request: str) -> Loaded:
        return self.load(self.pending.pop(request))

    def cancel(self, request: str) -> bool:
        return self.pending.pop(request, None) is not None

    def save(self, save: SaveSpec) -> None:
        raise RuntimeError("the blocks are gone")


def no_load(load: LoadSpec) -> Loaded:
    raise AssertionError("nothing was to be loaded")


def connector(finish: Callable[[LoadSpec], Loaded] = no_load) -> Any:
    """Both of a server's connectors in one; its loads end as `finish` says."""
    transfer = KVTransferConfig(**transfer_config(ServingConfig(store="store")))
    config = VllmConfig(kv_transfer_config=transfer)
    spec = SimpleNamespace(block_size=BLOCK_SIZE, sliding_window=None)
    cache: Any = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    made: Any = AwarenessConnector(config, KVConnectorRole.SCHEDULER, cache)
    made.worker = StubWorker(finish)
    return made


def step(made: Any, metadata: ConnectorMetadata, *ended: str) -> KVConnectorTransferResults:
    """One step of the worker's half."""
    made.bind_connector_metadata(metadata)
    # vLLM's Model Runner V2 calls it outside of any forward pass: there is no attention metadata.
    made.start_load_kv(SimpleNamespace(attn_metadata=None))
    made.wait_for_save()
    return made.get_transfer_results(set(ended))
