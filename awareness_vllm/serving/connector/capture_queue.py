"""Captured states of one worker, from a request's blocks to a file or to the head of chats."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.errors import AwarenessError
from awareness_vllm.files import atomic_write, disk_error
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.params import is_signed, signature

States = dict[str, Tensor]
"""`layers.i.key` and `layers.i.value` [T, H, D]."""
PENDING = "pending"
NOT_WRITTEN = "not written: "
"""How the status of a capture begins that the disk did not take."""


class CaptureQueue:
    """Captures that the server has announced, by a key that no client can guess. An offline engine
    announces none: its requests name their files, signed with the secret of its process."""

    def __init__(self) -> None:
        self.announced: dict[str, Path | None] = {}
        self.parts: dict[str, list[tuple[int, States]]] = {}
        self.results: dict[str, Future[States]] = {}
        self.files: dict[str, Path] = {}
        # Files are written beside the engine's steps: no other request waits for a disk.
        self.thread = ThreadPoolExecutor(1, "awareness-capture")

    def announce(self, key: str, path: str) -> None:
        """Expect a capture; with a path, write it there."""
        self.announced[key] = Path(path) if path else None

    def expects(self, key: str) -> bool:
        return key in self.announced or (_signed_path(key) is not None and key not in self.results)

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
        offline = _signed_path(key)
        path = offline or self.announced.pop(key, None)
        self.results[key] = future = Future[States]()
        if path is None:
            future.set_result(states)
        elif offline:
            _write(states, path, future)  # nobody waits for it, and the process may end
        else:
            self.files[key] = path
            self.thread.submit(_write, states, path, future)

    def status(self, key: str) -> str:
        """PENDING, "" when it is done, or an error, reported once; one of the disk begins with
        NOT_WRITTEN."""
        future = self.results.get(key)
        if future is None or not future.done():
            return PENDING
        self.files.pop(key, None)
        error = self.results.pop(key).exception()
        if error is None:
            return ""
        if found := disk_error(error):
            return NOT_WRITTEN + found
        return str(error) or type(error).__name__

    def collect(self, key: str) -> States:
        """The states of a capture that has no file. Raises AwarenessError."""
        future = self.results.pop(key, None)
        if future is None:
            raise AwarenessError("nothing was captured", found=f"no states of {key}")
        if (error := future.exception()) is not None:
            raise AwarenessError("the states were not read back", found=error) from error
        return future.result()

    def discard(self, key: str) -> None:
        """Forget a capture whose request came to nothing, and remove its file, also one that is
        being written."""
        self.announced.pop(key, None)
        self.parts.pop(key, None)
        future, path = self.results.pop(key, None), self.files.pop(key, None)
        if future is not None and path is not None and not future.cancel():
            future.add_done_callback(functools.partial(_remove, path))


def capture_to(path: str | Path) -> dict[str, str]:
    """The `kv_transfer_params` of a request to an offline engine: read it back into this file."""
    return {CAPTURE_KEY: f"{signature(CAPTURE_KEY, str(path))}:{path}"}


def _signed_path(key: str) -> Path | None:
    """The file that an offline engine's own request names; None for any other name."""
    mark, _, path = key.partition(":")
    return Path(path) if path and is_signed(mark, CAPTURE_KEY, path) else None


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
    if not done.set_running_or_notify_cancel():
        return
    try:
        with atomic_write(path, durable=False) as draft:
            save_file(states, draft)
        done.set_result({})
    except Exception as error:
        done.set_exception(error)


def _remove(path: Path, done: Future[Any]) -> None:
    path.unlink(missing_ok=True)
