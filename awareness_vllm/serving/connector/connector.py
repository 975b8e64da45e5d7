"""vLLM's KV connector: hands the work to its two halves and lets no exception reach the engine.

Loads are asynchronous: a memory is aligned beside the engine's steps, and written between two of
them. Only so can vLLM fail one request alone (`failed_recving`; block-level errors with several KV
cache groups would kill the engine), and no placeholder token is ever computed.

Each load's outcome goes back to the scheduler's instance, which counts it and puts it into the
response (metrics.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger

from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.metrics import (
    Failed,
    LoadMetrics,
    LoadStats,
    LoadTracker,
    StepOutcomes,
)
from awareness_vllm.serving.connector.scheduler import ConnectorMetadata, ConnectorScheduler
from awareness_vllm.serving.connector.worker import ConnectorWorker
from awareness_vllm.serving.supported import check_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.awareness.connector")


class AwarenessConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance in the scheduler, one in each worker; `role` says which half it is."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None  # it named this connector
        self.results = KVConnectorTransferResults()
        self.outcomes = StepOutcomes()
        self.tracker = LoadTracker()
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = ConnectorScheduler.from_vllm(kv_cache_config)
        else:
            config = ServingConfig.parse(transfer.kv_connector_extra_config)
            self.worker = ConnectorWorker.from_vllm(config, vllm_config, kv_cache_config)

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self.worker.warm_up()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ConnectorMetadata)
        self.results.failed_recving.update(metadata.failed)
        self.results.finished_recving.update(metadata.failed)
        for load in metadata.loads:
            with self.failing(load.request_id):
                self.worker.begin(load)
        for request in self.worker.ready(idle=metadata.idle):
            with self.failing(request):
                self.outcomes.by_request[request] = self.worker.finish(request)
                self.results.finished_recving.add(request)

    @contextlib.contextmanager
    def failing(self, request: str) -> Iterator[None]:
        """Any exception fails this request's load, and nothing else."""
        try:
            yield
        except Exception as error:
            logger.exception("request %s: its memory did not load", request)
            self.outcomes.by_request[request] = Failed(type(error).__name__)
            self.results.failed_recving.add(request)
            self.results.finished_recving.add(request)

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ConnectorMetadata)
        for save in metadata.saves:
            try:
                self.worker.save(save)
            except Exception:
                logger.exception("capture %s failed", save.name)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        # vLLM keeps an aborted request's blocks until its load has ended.
        self.results.finished_recving.update(filter(self.worker.cancel, finished_req_ids))
        results, self.results = self.results, KVConnectorTransferResults()
        return results

    def build_connector_worker_meta(self) -> StepOutcomes | None:
        outcomes, self.outcomes = self.outcomes, StepOutcomes()
        outcomes.editions = self.worker.editions.take_counts()
        return outcomes if outcomes.by_request or outcomes.editions else None

    def has_connector_metadata(self) -> bool:
        """Nothing is done layer by layer: vLLM asks before it calls the next two for each."""
        return False

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: no request is scheduled before its load is written."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing to save layer by layer: capture reads whole requests back."""

    # Scheduler half

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        try:
            tokens = self.scheduler.tokens_to_load(request, num_computed_tokens)
        except Exception as error:
            logger.exception("request %s is prefilled instead", request.request_id)
            self.tracker.record_failure(request.request_id, error)
            return 0, False
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        try:
            cached = self.scheduler.plan_load(request, blocks, num_external_tokens)
        except Exception as error:
            logger.exception("request %s is prefilled instead", request.request_id)
            if num_external_tokens:
                # vLLM waits for this load. A request that waits for none is running by then, and
                # the engine dies of hearing that its load has ended.
                self.scheduler.step.failed.append(request.request_id)
                self.tracker.record_failure(request.request_id, error)
        else:
            if num_external_tokens:
                plan = self.scheduler.plan_of(request)
                counted = plan is None or not plan.is_internal
                self.tracker.start(request.request_id, cached, counted=counted)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        try:
            self.scheduler.plan_saves(scheduler_output, CAPTURE_KEY)
        except Exception:
            logger.exception("a capture is not made")
        step = self.scheduler.take_step()
        step.idle = not scheduler_output.total_num_scheduled_tokens
        return step

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        # Of an aborted request nothing is kept.
        self.scheduler.failed |= self.tracker.outcomes.keys() & (
            connector_output.failed_recving or set()
        )
        meta = connector_output.kv_connector_worker_meta
        step = meta if isinstance(meta, StepOutcomes) else StepOutcomes()
        outcomes = step.by_request
        try:
            self.tracker.record_editions(step.editions)
            self.tracker.record(outcomes, connector_output.finished_recving or ())
        except Exception:
            logger.exception("loads are not counted: %s", outcomes)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        try:
            plan = self.scheduler.plan_of(request)
            return False, self.tracker.report(request, plan)
        except Exception:
            logger.exception("the response of request %s has no report", request.request_id)
            return False, None
        finally:
            self.scheduler.finish(request.request_id)
            self.tracker.finish(request.request_id)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # Statistics: taken in the scheduler (a worker has none), shown by the front end

    def get_kv_connector_stats(self) -> LoadStats | None:
        return self.tracker.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LoadStats:
        return LoadStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> LoadMetrics:
        return LoadMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
