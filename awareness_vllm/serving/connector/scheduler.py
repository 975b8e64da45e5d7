"""The scheduler half of the connector: which tokens a memory brings, and into which slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from awareness_vllm.serving.params import LoadParams

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

MIN_COMPUTED = 8
"""Prompt tokens that are always computed. For very few tokens the CPU backend takes other kernels
(a single row is a matrix-vector product), whose rounding differs from a prefill's: with a question
shorter than this, the memory's last tokens are computed rather than loaded."""

PAD_SLOT_ID = -1
"""The slot of a token that is not to be written: its block is outside a window (a null block)."""


@dataclass(frozen=True)
class LoadSpec:
    """Write the memories' tokens from the prompt's position `begin` on; `ids` are those of all of
    them. `slots[g]` are KV cache group g's slots, SKIP or not."""

    request_id: str
    params: LoadParams
    ids: list[int]
    begin: int
    slot_mapping: tuple[list[int], ...]


@dataclass(frozen=True)
class SaveSpec:
    """Read back the first `tokens` tokens of a request (capture), under a name."""

    name: str
    tokens: int
    slot_mapping: tuple[list[int], ...]


@dataclass
class ConnectorMetadata(KVConnectorMetadata):
    """What the worker half does in one engine step."""

    loads: list[LoadSpec] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    saves: list[SaveSpec] = field(default_factory=list)


@dataclass
class Capturing:
    """A request whose prompt is being computed, and its blocks so far, by KV cache group."""

    name: str
    tokens: int
    blocks: list[list[int]]


class ConnectorScheduler:
    """Keeps nothing of a request but the loads of the step at hand, the failures to remember, and
    the blocks of those whose prompt is captured."""

    def __init__(self, kv_cache_config: KVCacheConfig) -> None:
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self.block_sizes = [spec.block_size for spec in specs]
        self.windows = [getattr(spec, "sliding_window", None) for spec in specs]
        self.step = ConnectorMetadata()
        self.failed: set[str] = set()
        self.capturing: dict[str, Capturing] = {}

    def tokens_to_load(self, request: Request, computed: int) -> int:
        """Tokens of the request's memories beyond those that are computed; free of side effects."""
        params = LoadParams.of(request.kv_transfer_params, request.cache_salt)
        if params is None or request.request_id in self.failed:
            return 0
        return max(0, loadable(params, request) - computed)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """Plan the load of `external` tokens, the memory's last ones, into the request's blocks."""
        params = LoadParams.of(request.kv_transfer_params, request.cache_salt)
        if external == 0 or params is None:
            return
        # A request with embeddings for a prompt is refused by the endpoint.
        assert request.prompt_token_ids is not None
        tokens = loadable(params, request)
        begin = tokens - external
        block_ids = [
            [PAD_SLOT_ID if b.is_null else b.block_id for b in group] for group in blocks.blocks
        ]
        self.step.loads.append(
            LoadSpec(
                request_id=request.request_id,
                params=params,
                ids=list(request.prompt_token_ids[: params.tokens]),
                begin=begin,
                slot_mapping=self.slot_mapping(block_ids, begin, tokens),
            )
        )

    def slot_mapping(
        self, block_ids: list[list[int]], begin: int, end: int
    ) -> tuple[list[int], ...]:
        """Per group, the slots of positions begin … end-1; SKIP where there is no real block."""
        return tuple(
            [
                PAD_SLOT_ID
                if (block := group[p // size]) == PAD_SLOT_ID
                else block * size + p % size
                for p in range(begin, end)
            ]
            for group, size in zip(block_ids, self.block_sizes, strict=True)
        )

    def plan_saves(self, output: SchedulerOutput, key: str) -> None:
        """Capture: read back each request that asks for it, in the step that completes its prompt.

        A prompt may take several steps; the blocks that they bring are gathered on the way.
        """
        for new in output.scheduled_new_reqs:
            if new.sampling_params is None or new.prompt_token_ids is None:
                continue  # pooling, or a prompt of embeddings: never a capture
            params = (new.sampling_params.extra_args or {}).get("kv_transfer_params") or {}
            if isinstance(name := params.get(key), str):
                blocks = [list(ids) for ids in new.block_ids]
                self.capturing[new.req_id] = Capturing(name, len(new.prompt_token_ids), blocks)
                self.save_when_whole(new.req_id, new.num_computed_tokens, output)
        if not self.capturing:
            return
        later = output.scheduled_cached_reqs
        for request, ids, computed in zip(
            later.req_ids, later.new_block_ids, later.num_computed_tokens, strict=True
        ):
            if (capturing := self.capturing.get(request)) is None:
                continue
            if request in later.resumed_req_ids:
                capturing.blocks = [[] for _ in self.block_sizes]
            for group, new_ids in zip(capturing.blocks, ids or (), strict=False):
                group.extend(new_ids)
            self.save_when_whole(request, computed, output)

    def save_when_whole(self, request: str, computed: int, output: SchedulerOutput) -> None:
        """Plan the read-back of a request whose prompt is computed after this step.

        A layer with a window still holds all of a prompt that was computed in this one step; else
        it has given back the blocks outside of the window, and they may be another request's.
        """
        found = self.capturing[request]
        if computed + output.num_scheduled_tokens[request] < found.tokens:
            return
        del self.capturing[request]
        slot_mapping = list(self.slot_mapping(found.blocks, 0, found.tokens))
        for group, window in enumerate(self.windows):
            if window and window < found.tokens and computed:
                slot_mapping[group] = [PAD_SLOT_ID] * found.tokens
        self.step.saves.append(SaveSpec(found.name, found.tokens, tuple(slot_mapping)))

    def finished(self, request: str) -> None:
        """Forget a request."""
        self.failed.discard(request)
        self.capturing.pop(request, None)

    def take_step(self) -> ConnectorMetadata:
        """The step's work, handed over once."""
        step, self.step = self.step, ConnectorMetadata()
        return step


def loadable(params: LoadParams, request: Request) -> int:
    """How many first tokens of a request its memory brings."""
    return min(params.tokens - params.tail, request.num_tokens - MIN_COMPUTED)
