"""What `push` and `pull` share: a bar, and several files at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from tqdm import tqdm

AT_ONCE = 4
T = TypeVar("T")
R = TypeVar("R")


class Bar:
    """A bar of bytes on stderr, if that is a terminal; threads may share it."""

    def __init__(self, what: str, total: int = 0) -> None:
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr, disable=None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def expect(self, count: int) -> None:
        """So many bytes more are to come."""
        with self._lock:
            self._bar.total += count
            self._bar.refresh()

    def update(self, count: int) -> None:
        """So many bytes have gone through."""
        with self._lock:
            self._bar.update(count)


def in_parallel(one: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The results of all items, in their order, some at once. The first error comes when all are
    done: what does not fail is there."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(one, item) for item in items]
    return [future.result() for future in futures]
