"""Checks of what strangers claim, by the served model itself: memories' first states, maps' sinks.

A memory that was captured under this home, or that a trusted key signed, is not checked.
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from awareness_vllm.align.agreement import TOKENS
from awareness_vllm.errors import PackageCorrupt, WMatrixCorrupt
from awareness_vllm.models.hf import sink_ids
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.connector.worker_extension import CHECK_MEMORY, CHECK_SINK
from awareness_vllm.serving.params import Key, Part
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.wmatrix.registry import WMatrixEntry

if TYPE_CHECKING:
    from awareness_vllm.serving.resolver import MemoryResolver

logger = init_logger("vllm.awareness.canary")

MAX_CHECKED = 4096
"""Memories of which the outcome is kept."""


class Canary:
    """The memories that this server has checked, each once, before their first use."""

    def __init__(self, engine_client: MemoryEngineClient) -> None:
        self.engine_client = engine_client
        # By tenant, too: a file that one cannot read is no reason to refuse another one's.
        self.checks: OrderedDict[tuple[str, Key], asyncio.Task[str]] = OrderedDict()

    async def check(self, prompt: Prompt) -> None:
        """Check the claimed memories of a prompt that loads them.

        Raises:
            PackageCorrupt: states that are not those of the memory's text.
        """
        if not prompt.loads:
            return
        for memory in prompt.memories:
            if memory.origin == "claimed" and (complaint := await self._outcome(memory, prompt)):
                raise PackageCorrupt(
                    f"memory {memory.id} is not used", found=complaint, expected="genuine states"
                )

    async def _outcome(self, memory: ResolvedMemory, prompt: Prompt) -> str:
        """ "", or why the memory is refused; kept unless the check itself came to nothing."""
        part = Part(
            memory=memory.id,
            digest=memory.digest,
            wmatrix=memory.wmatrix.digest if memory.wmatrix else "",
            tokens=len(memory.ids),
        )
        key = prompt.tenant, part.key
        if key not in self.checks:
            ids = memory.ids[: memory.prefix + TOKENS]
            task = asyncio.create_task(self._compare(part, ids, prompt.tenant))
            task.add_done_callback(functools.partial(self._forget_failure, key))
            self.checks[key] = task
            while len(self.checks) > MAX_CHECKED:
                self.checks.popitem(last=False)
        self.checks.move_to_end(key)
        # A request that is given up does not take the check from the others.
        return await asyncio.shield(self.checks[key])

    async def _compare(self, part: Part, ids: list[int], tenant: str) -> str:
        engine_client = self.engine_client
        capture = await engine_client.read(ids)
        arguments = (CHECK_MEMORY, capture, part.model_dump_json(), tenant)
        try:
            complaints, errors = zip(*await engine_client.poll(*arguments), strict=True)
        finally:
            await engine_client.discard(capture)  # of a check that came to nothing
        if error := next(filter(None, errors), ""):
            raise PackageCorrupt(f"memory {part.memory} cannot be checked", found=error)
        return next(filter(None, complaints), "")

    def _forget_failure(self, key: tuple[str, Key], task: asyncio.Task[str]) -> None:
        if (task.cancelled() or task.exception() is not None) and self.checks.get(key) is task:
            del self.checks[key]


async def check_sinks(engine_client: MemoryEngineClient, resolver: MemoryResolver) -> None:
    """Check at start that the maps to the served model begin memories as the model itself does.

    Raises:
        WMatrixCorrupt: a sink of other tokens, or of other states than the model's own.
    """
    model = resolver.model
    for entry in resolver.registry:
        if not entry.manifest.target.same_model(model.geometry):
            continue
        expected = tuple(sink_ids(model.folder))
        if entry.manifest.sink != expected:
            raise _wrong_sink(entry, f"a sink of ids {entry.manifest.sink}", f"ids {expected}")
        capture = await engine_client.read(expected)
        complaints = await engine_client.poll(CHECK_SINK, capture, entry.digest)
        if complaint := next(filter(None, complaints), ""):
            raise _wrong_sink(entry, complaint, "the model's own states")


def _wrong_sink(entry: WMatrixEntry, found: str, expected: str) -> WMatrixCorrupt:
    return WMatrixCorrupt(
        f"W-Matrix {entry.path.name} cannot be used",
        found=found,
        expected=expected,
        remedy="fit it again on this model, or leave it out",
    )
