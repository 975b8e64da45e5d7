"""Reads of packages in threads, so few at once that their bytes stay within a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

READERS = 4
"""Files that are read at once: one that hangs holds up no other memory's requests."""


@dataclass(eq=False)
class Read:
    """One file of `size` bytes, and what `read` makes of it in a thread. It counts from its start
    until it is both `done` and `released`."""

    size: int
    read: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    started: bool = False
    done: bool = False
    released: bool = False


class ReadQueue:
    """Starts reads in their order while at most `max_reads` of them, and `max_bytes`, are held; a
    larger one starts alone. What was read is held until it is released: it lies in memory."""

    def __init__(self, max_reads: int, max_bytes: int) -> None:
        self.max_reads, self.max_bytes = max_reads, max_bytes
        self.threads = ThreadPoolExecutor(READERS, "awareness-read")
        self.lock = threading.Lock()
        self.reads: dict[Future[Any], Read] = {}

    def submit(self, size: int, read: Callable[[], Any]) -> Future[Any]:
        """Read now or later; its result."""
        new = Read(size, read)
        with self.lock:
            self.reads[new.future] = new
        self._start()
        return new.future

    def release(self, future: Future[Any]) -> None:
        """Say that a read's result is no longer used; one that has not started never does."""
        with self.lock:
            if (read := self.reads.get(future)) is None:
                return
            read.released = True
            future.cancel()
            if read.done or not read.started:
                del self.reads[future]
        self._start()

    @property
    def bytes(self) -> int:
        """Bytes that are held."""
        return sum(read.size for read in list(self.reads.values()) if read.started)

    def _start(self) -> None:
        with self.lock:
            held = [read for read in self.reads.values() if read.started]
            count, total = len(held), sum(read.size for read in held)
            for read in self.reads.values():
                if read.started:
                    continue
                count, total = count + 1, total + read.size
                if count > 1 and (count > self.max_reads or total > self.max_bytes):
                    return
                read.started = True
                self.threads.submit(self._run, read)

    def _run(self, read: Read) -> None:
        if not read.future.set_running_or_notify_cancel():
            self._end(read)
            return
        try:
            result = read.read()
        except BaseException as error:
            self._end(read)
            read.future.set_exception(error)
        else:
            self._end(read)
            read.future.set_result(result)

    def _end(self, read: Read) -> None:
        with self.lock:
            read.done = True
            if read.released:
                self.reads.pop(read.future, None)
        self._start()
