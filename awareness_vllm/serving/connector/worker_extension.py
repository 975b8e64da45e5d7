"""vLLM's `--worker-extension-cls`: the front end's calls to a worker's connector.

All of them go by `collective_rpc` under the names below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from awareness_vllm.serving.params import LoadParams, Part

if TYPE_CHECKING:
    from awareness_vllm.serving.connector.worker import ConnectorWorker

BIND = "awareness_bind_model"
PREFETCH = "awareness_prefetch"
EVICT = "awareness_evict"
ANNOUNCE = "awareness_announce"
STATE = "awareness_capture_state"
KEEP_HEAD = "awareness_keep_head"
FORGET = "awareness_forget"
CHECK_MEMORY = "awareness_check_memory"
CHECK_SINK = "awareness_check_sink"


class AwarenessWorkerExtension:
    """Mixed into vLLM's worker."""

    model_runner: Any

    @property
    def awareness(self) -> ConnectorWorker:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker  # type: ignore[attr-defined]

    def awareness_bind_model(self) -> None:
        """Lend the running model's embedding to the connector, which is given layers only."""
        self.awareness.bind_model(self.model_runner.get_model())

    def awareness_prefetch(self, ticket: str, params: str, pin: bool) -> str:
        return self.awareness.loader.prefetch(ticket, LoadParams.model_validate_json(params), pin)

    def awareness_evict(self, memory: str) -> bool:
        return self.awareness.loader.evict(memory)

    def awareness_announce(self, name: str, path: str) -> None:
        self.awareness.captures.announce(name, path)

    def awareness_capture_state(self, name: str) -> str:
        return self.awareness.captures.status(name)

    def awareness_keep_head(self, capture: str, name: str, ids: list[int]) -> str:
        return self.awareness.keep_head(capture, name, ids)

    def awareness_forget(self, name: str) -> None:
        self.awareness.captures.discard(name)

    def awareness_check_memory(self, capture: str, part: str, tenant: str) -> str:
        return self.awareness.canary.check_memory(capture, Part.model_validate_json(part), tenant)

    def awareness_check_sink(self, capture: str, wmatrix: str) -> str:
        return self.awareness.canary.check_sink(capture, wmatrix)
