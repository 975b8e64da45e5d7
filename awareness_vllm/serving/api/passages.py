"""Passages that questions point at, read by the model itself before their answers begin.

Each is computed by a request of the server's own, once, whoever asks for it, and kept by the
workers. What is not there in time stays aligned, and the response says so.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.inputs.engine import tokens_input
from vllm.logger import init_logger

from awareness_vllm.serving.params import Passage, is_of
from awareness_vllm.serving.passages import failure, sampling_params
from awareness_vllm.serving.prompt import PassageRequest, Prompt

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.awareness.passages")

LATE = "not re-read in time"
MAX_READING = 16
"""Passages that are read at once: each holds the blocks of its memory up to there."""


@dataclass(eq=False)
class Reading:
    """A passage of so many tokens that is being read, or was, and how many questions wait for
    it; the task's result says why it is not kept, "" where it is."""

    tokens: int
    task: asyncio.Task[str]
    waiting: int = 0


class Passages:
    """The passages that the workers of an engine are known to keep.

    Args:
        limit: tokens of them: half as many as the workers keep, so that none is dropped there
            first.
        timeout: seconds that a question waits for its passages.
    """

    def __init__(self, engine: EngineClient, limit: int = 2**16, timeout: float = 5.0) -> None:
        self.engine, self.limit, self.timeout = engine, limit, timeout
        self.readings: OrderedDict[Passage, Reading] = OrderedDict()
        self.disabled = ""
        self.slots = asyncio.Semaphore(MAX_READING)
        self.running: set[asyncio.Task[str]] = set()  # asyncio itself keeps weak references only

    async def ensure(self, prompt: Prompt, question: str) -> Prompt:
        """The prompt with the passages that a question points at laid over its memories."""
        if not prompt.budget or prompt.params is None:
            return prompt
        if self.disabled:
            may = any(memory.text is not None for memory in prompt.memories)
            return prompt.with_rereads((), self.disabled) if may else prompt
        requests = await asyncio.to_thread(prompt.passage_requests, question)
        if not requests:
            return prompt
        readings = [self._reading(request) for request in requests]
        await self._wait(readings)
        outcomes = [outcome(reading.task) for reading in readings]
        return prompt.with_passages([*zip(requests, outcomes, strict=True)])

    def forget(self, memory: str) -> None:
        """Count a memory's passages as unread: the workers have dropped them."""
        for name in [name for name in self.readings if is_of(name[0], memory)]:
            del self.readings[name]

    def _reading(self, request: PassageRequest) -> Reading:
        """The reading of a passage, which begins with the first question for it."""
        name = request.plan.passage_name
        assert name is not None
        if (reading := self.readings.get(name)) is None:
            begin, end = request.span
            task = asyncio.create_task(self._read(request))
            reading = self.readings[name] = Reading(end - begin, task)
            self.running.add(task)
            task.add_done_callback(lambda task: self._ended(name, reading))
            self._make_room()
        self.readings.move_to_end(name)
        return reading

    async def _wait(self, readings: Sequence[Reading]) -> None:
        """Wait until all are read, or for so long; a reading that nobody waits for any more, its
        questions given up, ends where it is."""
        tasks = [reading.task for reading in readings if not reading.task.done()]
        if not tasks:
            return
        for reading in readings:
            reading.waiting += 1
        try:
            await asyncio.wait(tasks, timeout=self.timeout)
        except asyncio.CancelledError:
            for reading in readings:
                if reading.waiting == 1:
                    reading.task.cancel()
            raise
        finally:
            for reading in readings:
                reading.waiting -= 1

    async def _read(self, request: PassageRequest) -> str:
        """Have the model read a passage after the aligned states before it; "" or why the workers
        do not keep it."""
        prompt = tokens_input(request.ids, cache_salt=request.plan.cache_salt)
        name, report = f"awareness-passage-{secrets.token_hex(8)}", None
        async with self.slots:
            async for output in self.engine.generate(prompt, sampling_params(request), name):
                report = output.kv_transfer_params or report
        return failure(report)

    def _ended(self, name: Passage, reading: Reading) -> None:
        """Forget a passage that is not kept: the next question tries again."""
        self.running.discard(reading.task)
        if reason := outcome(reading.task):
            if not reading.task.cancelled():
                logger.warning("positions %s of %s are not re-read: %s", name[1], name[0], reason)
            if self.readings.get(name) is reading:
                del self.readings[name]

    def _make_room(self) -> None:
        total = sum(reading.tokens for reading in self.readings.values())
        for name, reading in list(self.readings.items()):
            if total <= self.limit:
                return
            if reading.task.done():
                total -= reading.tokens
                del self.readings[name]


def outcome(task: asyncio.Task[str]) -> str:
    """ "", or why a passage is not kept."""
    if not task.done():
        return LATE
    if task.cancelled():
        return "given up"
    if (error := task.exception()) is not None:
        return type(error).__name__
    return task.result()
