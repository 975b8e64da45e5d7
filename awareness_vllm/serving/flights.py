"""Blocking work of a front end: in threads, once for each key, so many at once, with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from awareness_vllm.errors import RegistryTimeout, TooManyLoads

MAX_REMEMBERED = 4096
T = TypeVar("T")


@dataclass
class Flight(Generic[T]):
    """Work under way; somebody waits for it until the time `until`, by `time.monotonic`."""

    until: float
    task: asyncio.Task[T] | None = None


class Flights(Generic[T]):
    """Work under way by key: `limit` of it in threads, up to `queue` with what waits for one.

    The threads are daemons: what a registry holds up does not hold up the server's end.
    """

    def __init__(self, what: str, limit: int, queue: int) -> None:
        self.what, self.queue, self.slots = what, queue, asyncio.Semaphore(limit)
        self.flights: dict[str, Flight[T]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.flights

    async def run(self, key: str, work: Callable[[Flight[T]], T], until: float) -> T:
        """The result of the work for a key, which goes on after the deadline.

        Raises:
            TooManyLoads: too much waits already; RegistryTimeout: none by then; what `work` raises.
        """
        flight = self.flights.get(key)
        if flight is None:
            if len(self.flights) >= self.queue:
                raise TooManyLoads(
                    f"the server waits for as many {self.what} as it may",
                    found=f"{len(self.flights)} under way",
                    remedy="send the request again soon",
                )
            flight = self.flights[key] = Flight(until)
            flight.task = asyncio.create_task(self._run(flight, work))
            flight.task.add_done_callback(lambda task: self._end(key, task))
        assert flight.task is not None
        flight.until = max(flight.until, until)
        try:
            async with asyncio.timeout(until - time.monotonic()) as limit:
                return await asyncio.shield(flight.task)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise RegistryTimeout(
                "the registry took too long",
                found=f"{self.what} that did not end within the request's deadline",
                expected="an answer within --load-timeout",
                remedy="send the request again: a pull goes on where this one has stopped",
            ) from error

    async def _run(self, flight: Flight[T], work: Callable[[Flight[T]], T]) -> T:
        async with self.slots:
            return await in_thread(lambda: work(flight))

    def _end(self, key: str, task: asyncio.Task[T]) -> None:
        del self.flights[key]
        if not task.cancelled():
            task.exception()  # looked at, should nobody wait any more


async def in_thread(work: Callable[[], T]) -> T:
    """The result of work in a thread of its own, a daemon."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(set_result: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the server with it
            loop.call_soon_threadsafe(lambda: None if result.done() else set_result())

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            settle(lambda error=error: result.set_exception(error))  # type: ignore[misc]
        else:
            settle(lambda: result.set_result(value))

    threading.Thread(target=run, daemon=True, name="awareness-registry").start()
    return await result


class Remembered(Generic[T]):
    """Values by key, each for a while."""

    def __init__(self) -> None:
        self.values: OrderedDict[str, tuple[T, float]] = OrderedDict()

    def get(self, key: str) -> T | None:
        """The value of a key; None where there is none any more."""
        value, until = self.values.get(key, (None, 0.0))
        return value if time.monotonic() < until else None

    def put(self, key: str, value: T, seconds: float) -> None:
        self.values[key] = value, time.monotonic() + seconds
        self.values.move_to_end(key)
        while len(self.values) > MAX_REMEMBERED:
            self.values.popitem(last=False)

    def drop(self, key: str) -> None:
        self.values.pop(key, None)
