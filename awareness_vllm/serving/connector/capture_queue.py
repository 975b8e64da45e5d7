"""Captured states of one worker, from a request's blocks to a file or to the head of chats."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.errors import AwarenessError
from awareness_vllm.files import atomic_write
from awareness_vllm.packages.manifest import tensor_name

States = dict[str, Tensor]
"""`layers.i.key` and `layers.i.value` [T, H, D]."""
PENDING = "pending"


class CaptureQueue:
    """Captures that the server has announced, by a key that no client can guess; with `everything`,
    all that are asked for (an offline engine has no clients)."""

    def __init__(self, *, everything: bool = False) -> None:
        self.everything = everything
        self.announced: dict[str, Path | None] = {}
        self.parts: dict[str, list[tuple[int, States]]] = {}
        self.results: dict[str, Future[States]] = {}
        # Files are written beside the engine's steps: no other request waits for a disk.
        self.thread = ThreadPoolExecutor(1, "awareness-capture")

    def announce(self, key: str, path: str) -> None:
        """Expect a capture; with a path, write it there."""
        self.announced[key] = Path(path) if path else None

    def expects(self, key: str) -> bool:
        return key in self.announced or (self.everything and key not in self.results)

    def capture(
        self, key: str, read: Callable[[], States], begin: int = 0, *, last: bool = True
    ) -> None:
        """Read the states of a step's tokens back now, while their blocks hold them: those from
        position `begin` on. With the `last` ones all of them are written, later.

        After an error there is nothing more to expect of this key.
        """
        parts = self.parts.setdefault(key, [])
        try:
            cut_at(parts, begin)
            parts.append((begin, read()))
            if not last:
                return
            states = joined([part for _, part in self.parts.pop(key)])
        except Exception as error:
            self.discard(key)
            self.results[key] = future = Future[States]()
            future.set_exception(error)
            return
        path = self.announced.pop(key, Path(key) if self.everything else None)
        self.results[key] = future = Future[States]()
        if path is None:
            future.set_result(states)
        elif self.everything:
            _write(states, path, future)  # nobody waits for it, and the process may end
        else:
            self.thread.submit(_write, states, path, future)

    def status(self, key: str) -> str:
        """PENDING, "" when it is done, or the error; reported once."""
        future = self.results.get(key)
        if future is None or not future.done():
            return PENDING
        error = self.results.pop(key).exception()
        return "" if error is None else str(error) or type(error).__name__

    def collect(self, key: str) -> States:
        """The states of a capture that has no file. Raises AwarenessError."""
        future = self.results.pop(key, None)
        if future is None:
            raise AwarenessError("nothing was captured", found=f"no states of {key}")
        if (error := future.exception()) is not None:
            raise AwarenessError("the states were not read back", found=error) from error
        return future.result()

    def discard(self, key: str) -> None:
        """Forget a capture whose request came to nothing."""
        self.announced.pop(key, None)
        self.parts.pop(key, None)
        self.results.pop(key, None)


def cut_at(parts: list[tuple[int, States]], begin: int) -> None:
    """Drop what a preempted request computes again: all states from position `begin` on."""
    while parts and parts[-1][0] >= begin:
        parts.pop()
    if parts:
        first, states = parts[-1]
        parts[-1] = first, {name: one[: begin - first] for name, one in states.items()}


def joined(parts: list[States]) -> States:
    """Consecutive states as one."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def keys_and_values(states: States, layers: int) -> tuple[list[Tensor], list[Tensor]]:
    """Captured states by layer."""
    keys, values = (
        [states[tensor_name(i, part)] for i in range(layers)] for part in ("key", "value")
    )
    return keys, values


def _write(states: States, path: Path, done: Future[States]) -> None:
    """Write a file whole or not at all."""
    try:
        with atomic_write(path) as draft:
            save_file(states, draft)
        done.set_result({})
    except Exception as error:
        done.set_exception(error)
