"""Prefetches of a front end: tickets at the workers, and one poll for all of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from awareness_vllm.errors import PackageCorrupt, TooManyLoads
from awareness_vllm.serving.connector.capture_queue import PENDING
from awareness_vllm.serving.connector.prefetcher import TOO_MANY
from awareness_vllm.serving.connector.worker_extension import CANCEL, POLL, PREFETCH
from awareness_vllm.serving.params import LoadParams

POLL_S = 0.02
Result = TypeVar("Result")

Call = Callable[..., Awaitable[list[Any]]]
"""Calls all workers, by name; their answers."""


@dataclass
class Waiting:
    """The answers of the workers to one ticket, and what waits until none of them is PENDING."""

    answers: list[str]
    ended: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Prefetches:
    """The prefetches that a front end waits for."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.waiting: dict[str, Waiting] = {}
        self.poller: asyncio.Task[None] | None = None

    async def run(self, params: LoadParams, *, pin: bool = False) -> str:
        """Align memories ahead of their first request; "cold", or "warm" where they were already.
        With `pin` they stay in the warm tier. Whoever stops waiting gives them up.

        Raises:
            PackageCorrupt: a worker cannot; TooManyLoads: a worker has too many tickets.
        """
        ticket = secrets.token_hex(16)
        try:
            answers = await self.call(PREFETCH, ticket, params.model_dump_json(), pin)
            if PENDING in answers:
                answers = await self._all_answers(ticket, answers)
        except BaseException:
            await asyncio.shield(self.call(CANCEL, [ticket]))
            raise
        if TOO_MANY in answers:
            raise TooManyLoads(
                "the server has too many prefetches",
                found=TOO_MANY,
                remedy="send the request again soon",
            )
        if errors := [answer for answer in answers if answer not in ("cold", "warm")]:
            raise PackageCorrupt("the memory cannot be loaded", found=errors[0])
        return "cold" if "cold" in answers else "warm"

    async def _all_answers(self, ticket: str, answers: list[str]) -> list[str]:
        waiting = self.waiting[ticket] = Waiting(answers)
        if self.poller is None or self.poller.done():
            self.poller = asyncio.create_task(self._poll())
        try:
            await waiting.ended
        finally:
            del self.waiting[ticket]
        return waiting.answers

    async def _poll(self) -> None:
        """Ask about all tickets at once, as long as there are any."""
        while tickets := list(self.waiting):
            try:
                reports = await self.call(POLL, tickets)
            except Exception as error:
                for one in self.waiting.values():
                    one.ended.set_exception(error)
                return
            for i, ticket in enumerate(tickets):
                if (waiting := self.waiting.get(ticket)) is not None:
                    self._record(waiting, [answers[i] for _, answers in reports])
            # An idle engine aligns a block at each poll, and is asked at once for the next.
            await asyncio.sleep(0 if any(aligned for aligned, _ in reports) else POLL_S)

    def _record(self, waiting: Waiting, answers: list[str]) -> None:
        """Keep each worker's first answer that is one: it gives it only once."""
        pairs = zip(waiting.answers, answers, strict=True)
        waiting.answers = [new if old == PENDING else old for old, new in pairs]
        if PENDING not in waiting.answers and not waiting.ended.done():
            waiting.ended.set_result(None)


async def while_connected(raw_request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of a route's work; None where the client goes before: the work is cancelled.

    vLLM's `with_cancellation` would take such a request off its gauge of the server's load, on
    which our routes are not counted.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(raw_request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(raw_request: Request) -> None:
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass
