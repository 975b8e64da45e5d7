"""Memories that a worker aligns ahead of their first request, by ticket of the front end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from awareness_vllm.serving.connector.capture_queue import PENDING
from awareness_vllm.serving.connector.loader import (
    MemoryLoader,
    PendingAlignment,
    overall_temperature,
)
from awareness_vllm.serving.params import LoadParams

MAX_TICKETS = 256
TOO_MANY = "too many prefetches"
"""The answer to a prefetch beyond MAX_TICKETS."""
LIFETIME_S = 30.0
"""A ticket that nobody has asked about for so long is given up: its front end is gone."""
QUIET_S = 0.05
"""An engine whose last step ended so long ago has nothing to do."""


@dataclass
class Ticket:
    """The alignments that one prefetch waits for, and when it was last asked about."""

    alignments: list[PendingAlignment]
    asked: float


class Prefetcher:
    """Prefetches of one worker. Its engine's steps align them, as they do the memories of requests;
    a poll aligns a block only where there are no steps."""

    def __init__(self, loader: MemoryLoader) -> None:
        self.loader = loader
        self.tickets: dict[str, Ticket] = {}
        self.stepped = 0.0

    def begin(self, ticket: str, params: LoadParams, pin: bool) -> str:
        """Request memories, `pin` them in the warm tier; answers as `poll` does."""
        self._expire()
        if len(self.tickets) >= MAX_TICKETS:
            return TOO_MANY
        alignments = [self.loader.request(part, params.tenant) for part in params.parts]
        if pin:
            self.loader.warm.pinned.update(alignment.key for alignment in alignments)
        self.tickets[ticket] = Ticket(alignments, time.perf_counter())
        return self._answer(ticket)

    def poll(self, tickets: Sequence[str]) -> tuple[bool, list[str]]:
        """Whether something was aligned, and for each ticket PENDING, "warm", "cold", or the
        error's message: an exception would cross the engine as a mere text. A ticket is answered
        once, then forgotten."""
        self._expire()
        idle = time.perf_counter() - self.stepped > QUIET_S
        aligned = idle and self.loader.advance()
        return aligned, [self._answer(ticket) for ticket in tickets]

    def cancel(self, tickets: Sequence[str]) -> None:
        """Give tickets up; what nobody else waits for is aligned no further."""
        for ticket in tickets:
            if (given_up := self.tickets.pop(ticket, None)) is not None:
                for alignment in given_up.alignments:
                    self.loader.release(alignment)

    def _answer(self, name: str) -> str:
        if (ticket := self.tickets.get(name)) is None:
            return "the prefetch was given up"
        ticket.asked = time.perf_counter()
        if not all(alignment.result.done() for alignment in ticket.alignments):
            return PENDING
        del self.tickets[name]
        try:
            return overall_temperature(a.result.result()[1] for a in ticket.alignments)
        except Exception as error:
            return str(error) or type(error).__name__

    def _expire(self) -> None:
        before = time.perf_counter() - LIFETIME_S
        self.cancel([name for name, ticket in self.tickets.items() if ticket.asked < before])
