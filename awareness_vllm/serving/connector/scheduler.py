"""The scheduler half of the connector: which tokens a memory brings, and into which blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from awareness_vllm.serving.connector.kv_layout import NULL_BLOCK, windows_of
from awareness_vllm.serving.params import LoadParams, Passage

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

MIN_COMPUTED = 8
"""Prompt tokens that are always computed. For very few tokens the CPU backend takes other kernels
(a single row is a matrix-vector product), whose rounding differs from a prefill's: with a question
shorter than this, the memory's last tokens are computed rather than loaded."""
MAX_PLANS = 4096
"""Requests whose load plans are kept; beyond, the oldest plan is parsed again when it is needed."""

BlockIds = tuple[list[int], ...]
"""A request's blocks in order, by KV cache group; NULL_BLOCK for those that hold nothing."""


@dataclass(frozen=True)
class LoadSpec:
    """The load of a prompt's positions begin … end-1 into a request's blocks; `ids` are those of
    all of its memories."""

    request_id: str
    params: LoadParams
    ids: list[int]
    begin: int
    end: int
    block_ids: BlockIds


@dataclass(frozen=True)
class SaveSpec:
    """The read-back of positions begin … end-1 of a captured prompt of `tokens` tokens, under its
    name: what one step has computed of it. The rows of a `passage` stay in the worker."""

    name: str
    begin: int
    end: int
    tokens: int
    block_ids: BlockIds
    passage: Passage | None = None


@dataclass
class PendingCapture:
    """A prompt of `tokens` tokens that is captured step by step from position `first` on: those
    before `read` are planned. What comes before a `passage` must be aligned, never computed."""

    name: str
    tokens: int
    block_ids: BlockIds
    first: int = 0
    passage: Passage | None = None
    read: int = field(init=False)

    def __post_init__(self) -> None:
        self.read = self.first


@dataclass
class ConnectorMetadata(KVConnectorMetadata):
    """The work of the worker half in one engine step, which computes nothing else if it is `idle`:
    a worker cannot tell, since Model Runner V2 calls it after the forward pass, outside of it."""

    loads: list[LoadSpec] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    saves: list[SaveSpec] = field(default_factory=list)
    idle: bool = False


class ConnectorScheduler:
    """Plans loads and captures. Of a request it keeps the load plan, whether a load failed, and the
    blocks of a prompt that is captured.

    Args:
        windows: of each KV cache group that outside of which vLLM gives blocks back, or None.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.windows = windows
        self.step = ConnectorMetadata()
        self.plans: dict[str, LoadParams | None] = {}
        self.failed: set[str] = set()
        self.captures: dict[str, PendingCapture] = {}

    @classmethod
    def from_vllm(cls, kv_cache_config: KVCacheConfig) -> ConnectorScheduler:
        return cls(windows_of(kv_cache_config))

    def plan_of(self, request: Request) -> LoadParams | None:
        """A request's load plan, parsed and its signature checked at first sight."""
        if request.request_id not in self.plans:
            plan = LoadParams.of(request.kv_transfer_params, request.cache_salt)
            while len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[request.request_id] = plan
        return self.plans[request.request_id]

    def tokens_to_load(self, request: Request, computed: int) -> int:
        """Tokens of the request's memories beyond those that are computed; plans nothing yet."""
        plan = self.plan_of(request)
        if plan is None or request.request_id in self.failed:
            return 0
        return max(0, loadable(plan, request) - computed)

    def plan_load(self, request: Request, blocks: KVCacheBlocks, external: int) -> int:
        """Plan the load of `external` tokens, the memory's last ones, into the request's blocks.

        Returns:
            tokens before them, which the prefix cache has.
        """
        plan = self.plan_of(request)
        if external == 0 or plan is None:
            return 0
        # A request with embeddings for a prompt is refused by the endpoint.
        assert request.prompt_token_ids is not None
        end = loadable(plan, request)
        block_ids = tuple(
            [NULL_BLOCK if block.is_null else block.block_id for block in group]
            for group in blocks.blocks
        )
        ids = list(request.prompt_token_ids[: plan.tokens])
        load = LoadSpec(request.request_id, plan, ids, end - external, end, block_ids)
        self.step.loads.append(load)
        return load.begin

    def plan_saves(self, output: SchedulerOutput, key: str) -> None:
        """Plan captures: of each request that asks for one, what this step computes of its prompt.

        A prompt may take several steps; the blocks that they bring are gathered on the way.
        """
        for new in output.scheduled_new_reqs:
            if new.sampling_params is None or new.prompt_token_ids is None:
                continue  # pooling, or a prompt of embeddings: never a capture
            params = (new.sampling_params.extra_args or {}).get("kv_transfer_params") or {}
            plan = self.plans.get(new.req_id)
            if plan is not None and (passage := plan.passage_name) is not None:
                name, first = new.req_id, passage[1][0]
            elif (asked := capture_of(params.get(key))) is not None:
                (name, first), passage = asked, None
            else:
                continue
            block_ids = tuple(list(ids) for ids in new.block_ids)
            tokens = len(new.prompt_token_ids)
            capture = PendingCapture(name, tokens, block_ids, first, passage)
            if (preempted := self.captures.get(new.req_id)) is not None:
                capture.read = preempted.read  # Model Runner V2 resumes a request as a new one
            self.captures[new.req_id] = capture
            self.plan_save(new.req_id, new.num_computed_tokens, output)
        if not self.captures:
            return
        later = output.scheduled_cached_reqs
        for request, ids, computed in zip(
            later.req_ids, later.new_block_ids, later.num_computed_tokens, strict=True
        ):
            if (pending := self.captures.get(request)) is None:
                continue
            if request in later.resumed_req_ids:
                for group in pending.block_ids:
                    group.clear()
            for group, new_ids in zip(pending.block_ids, ids or (), strict=False):
                group.extend(new_ids)
            self.plan_save(request, computed, output)

    def plan_save(self, request: str, computed: int, output: SchedulerOutput) -> None:
        """Plan the read-back of what is new of a prompt after this step.

        A layer with a window holds what this step computes, and the window before it; of tokens
        that the prefix cache brought it may hold less: those blocks may be another request's.
        """
        capture = self.captures[request]
        if capture.passage and computed < capture.first:
            # Its load has failed: what it computes now follows other states than the aligned ones.
            del self.captures[request]
            return
        # A preempted request is computed again, from wherever the prefix cache leaves off.
        begin = max(capture.first, min(computed, capture.read))
        end = min(computed + output.num_scheduled_tokens[request], capture.tokens)
        if begin >= end:
            return  # this step stays before what is captured
        block_ids = tuple(
            [NULL_BLOCK] * len(group) if window and begin < computed - window + 1 else list(group)
            for group, window in zip(capture.block_ids, self.windows, strict=True)
        )
        self.step.saves.append(
            SaveSpec(capture.name, begin, end, capture.tokens, block_ids, capture.passage)
        )
        capture.read = end
        if end == capture.tokens:
            del self.captures[request]

    def finish(self, request_id: str) -> None:
        """Forget a request."""
        self.plans.pop(request_id, None)
        self.failed.discard(request_id)
        self.captures.pop(request_id, None)

    def take_step(self) -> ConnectorMetadata:
        """The step's work, handed over once."""
        step, self.step = self.step, ConnectorMetadata()
        return step


def capture_of(asked: object) -> tuple[str, int] | None:
    """The name of a capture and the position from which its prompt is read back: of a value that is
    the name alone, or `{"name": …, "begin": …}`; None where there is none."""
    if isinstance(asked, str):
        return asked, 0
    if not isinstance(asked, Mapping):
        return None
    name, begin = asked.get("name"), asked.get("begin", 0)
    if not isinstance(name, str) or not isinstance(begin, int) or begin < 0:
        return None
    return name, begin


def loadable(plan: LoadParams, request: Request) -> int:
    """First tokens of a request that its memories bring."""
    return min(plan.tokens - plan.tail, request.num_tokens - MIN_COMPUTED)
