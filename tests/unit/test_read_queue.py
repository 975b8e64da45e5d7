"""Reads of packages: never more bytes at once than the bound, however many are wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from awareness_vllm.serving.connector.read_queue import ReadQueue

pytestmark = pytest.mark.unit

SECONDS = 30.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def started(queue: ReadQueue, futures: list[Future[Any]]) -> list[int]:
    return [i for i, one in enumerate(futures) if one in queue.reads and queue.reads[one].started]


def test_what_was_read_counts_until_it_is_released() -> None:
    queue = ReadQueue(max_reads=8, max_bytes=100)
    futures = [queue.submit(40, lambda: "read") for _ in range(5)]
    assert [one.result(SECONDS) for one in futures[:2]] == ["read"] * 2
    assert started(queue, futures) == [0, 1]
    assert queue.bytes == 80
    queue.release(futures[0])
    assert futures[2].result(SECONDS) == "read"
    assert started(queue, futures) == [1, 2]
    for one in futures[1:]:
        one.result(SECONDS)
        queue.release(one)
    until(lambda: not queue.reads)


def test_only_so_many_are_held_and_a_large_one_alone() -> None:
    queue = ReadQueue(max_reads=2, max_bytes=100)
    futures = [queue.submit(size, lambda: None) for size in (1, 1, 1, 500, 1)]
    assert started(queue, futures) == [0, 1]
    queue.release(futures[0])
    queue.release(futures[1])
    until(lambda: 2 in started(queue, futures))
    assert 3 not in started(queue, futures)
    futures[2].result(SECONDS)
    queue.release(futures[2])
    until(lambda: started(queue, futures) == [3])


def test_a_read_that_is_given_up_never_starts_or_counts_until_it_ends() -> None:
    queue, go_on, began = ReadQueue(max_reads=1, max_bytes=100), threading.Event(), []

    def read() -> None:
        began.append(1)
        assert go_on.wait(SECONDS)

    running, waiting, last = (queue.submit(10, read) for _ in range(3))
    until(lambda: bool(began))
    queue.release(waiting)
    assert waiting.cancelled()
    queue.release(running)
    assert (queue.bytes, len(began)) == (10, 1)
    go_on.set()
    last.result(SECONDS)
    assert len(began) == 2


def test_an_error_is_the_reads_own() -> None:
    def read() -> None:
        raise OSError("gone")

    queue = ReadQueue(max_reads=1, max_bytes=1)
    assert str(queue.submit(1, read).exception(SECONDS)) == "gone"
