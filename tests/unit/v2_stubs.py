"""CUDA's path through vLLM on a CPU: vLLM's own scheduler over workers of v2_worker.

Whatever crosses from one of vLLM's processes to another is pickled on its way.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from v2_model import Served
from v2_worker import Rank
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

SECONDS = 120.0
"""A test gives up waiting after so many."""


@dataclass
class Engine:
    """vLLM's scheduler over one or several ranks; `overlapped` schedules a step ahead of the last
    one's output, as vLLM does on CUDA.

    Attributes:
        blocks: of the pool, the null block among them.
        reports: by request that has ended, its response's `kv_transfer_params`.
        outputs: what the workers' connectors reported, step by step.
    """

    served: Served
    ranks: list[Rank]
    blocks: int | None = None
    overlapped: bool = False
    reports: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    outputs: list[KVConnectorOutput] = field(default_factory=list)
    stats: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.served.config
        cache = self.served.pool_of(self.blocks)
        config.scheduler_config.async_scheduling = self.overlapped
        config.cache_config.num_gpu_blocks = cache.num_blocks
        assert config.use_v2_model_runner
        made = AsyncScheduler if self.overlapped else Scheduler
        self.scheduler = made(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=Served.BLOCK_SIZE,
            log_stats=True,
        )
        connector: Any = self.scheduler.connector
        self.connector = connector
        self.aggregator = KVOutputAggregator.from_connector(connector, len(self.ranks))
        self.free = self.free_blocks
        self.queue: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.before_output: Callable[[ModelRunnerOutput], None] = lambda output: None

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def abort(self, *names: str) -> None:
        """Abort requests between two steps."""
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def step(self) -> SchedulerOutput | None:
        """A turn of the engine's loop; the step that it scheduled, if any."""
        scheduled = None
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.queue.appendleft((scheduled, self.execute(scheduled)))
            if self.overlapped and len(self.queue) < 2 and self.scheduler.has_requests():
                return scheduled
        if self.queue:
            self.take_up(*self.queue.pop())
        return scheduled

    def execute(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """All ranks' outputs as one. Each rank gets a copy, as another process would."""
        sent = pickle.dumps(scheduled)
        results = [pickle.loads(pickle.dumps(rank.step(pickle.loads(sent)))) for rank in self.ranks]
        output = self.aggregator.aggregate(results)
        assert output is not None
        return output

    def take_up(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> None:
        # Here vLLM takes up the aborts that came while the step was running.
        self.before_output(output)
        if output.kv_connector_output is not None:
            self.outputs.append(output.kv_connector_output)
        for client in self.scheduler.update_from_output(scheduled, output).values():
            if client.scheduler_stats is not None:
                self.stats.append(client.scheduler_stats)
            for one in client.outputs:
                self.tokens[one.request_id] = self.tokens.get(one.request_id, 0) + len(
                    one.new_token_ids
                )
                if one.finish_reason is not None:
                    self.reports[one.request_id] = one.kv_transfer_params

    def until(self, condition: Callable[[], Any]) -> None:
        """Step until something holds."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"still waiting: {self.scheduler.requests}"
            self.step()

    def finish(self) -> None:
        """Step until nothing is left, and see that nothing was left behind: no request, no block,
        no plan."""
        self.until(lambda: not (self.scheduler.has_requests() or self.queue))
        assert self.scheduler.requests == {}
        assert self.free_blocks == self.free
        half, tracker = self.connector.scheduler, self.connector.tracker
        left: list[Any] = [half.plans, half.failed, half.captures]
        left += [tracker.outcomes, tracker.by_rank, tracker.cached, tracker.uncounted]
        for rank in self.ranks:
            left += [rank.worker.pending, rank.worker.loader.pending]
        assert not any(left), left
