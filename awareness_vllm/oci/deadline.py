"""Deadlines: how long a thread talks to registries, over all of its requests together."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from awareness_vllm.errors import RegistryTimeout

Until = Callable[[], float]
"""A time, by `time.monotonic`, which may move while it is waited for."""
_UNTIL: ContextVar[Until] = ContextVar("until", default=lambda: math.inf)


@contextlib.contextmanager
def deadline_at(until: Until) -> Iterator[None]:
    """Within, requests end by a deadline: with RegistryTimeout, whatever a registry still sends.

    It holds for this thread; for another one in a copy of its context.
    """
    token = _UNTIL.set(until)
    try:
        yield
    finally:
        _UNTIL.reset(token)


def has_deadline() -> bool:
    """Whether there is a deadline."""
    return _UNTIL.get()() < math.inf


def seconds_left() -> float:
    """The seconds until the deadline, infinity without one. Raises RegistryTimeout: it is over."""
    left = _UNTIL.get()() - time.monotonic()
    if left <= 0:
        raise RegistryTimeout(
            "the registry took too long",
            found="requests that did not end by the deadline of all of them together",
            remedy="try again",
        )
    return left


def check_deadline() -> None:
    """Check that the deadline is not over. Raises RegistryTimeout."""
    seconds_left()
