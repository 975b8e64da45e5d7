"""vLLM's `--worker-extension-cls`: lends the running model's embedding to the connector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awareness_vllm.serving.connector import AwarenessConnector

BIND = "awareness_bind_model"


class AwarenessWorkerExtension:
    """Mixed into vLLM's worker; called once per server by `collective_rpc(BIND)`."""

    model_runner: Any

    def awareness_bind_model(self) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector: AwarenessConnector = get_kv_transfer_group()  # type: ignore[assignment]
        connector.bind_model(self.model_runner.get_model())
