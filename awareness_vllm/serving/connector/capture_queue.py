"""States on their way from a request's blocks to a file or to a prompt's head, in one worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import AwarenessError
from awareness_vllm.packages.manifest import tensor_name

States = dict[str, Tensor]
PENDING = "pending"


class Captures:
    """Captures that the server has announced, by a name that no client can guess; with
    `everything`, whatever is asked for (an offline engine has no clients)."""

    def __init__(self, *, everything: bool = False) -> None:
        self.everything = everything
        self.announced: dict[str, Path | None] = {}
        self.found: dict[str, Future[States]] = {}
        # Files are written beside the engine's steps: no other request waits for a disk.
        self.thread = ThreadPoolExecutor(1, "awareness-capture")

    def announce(self, name: str, path: str) -> None:
        """Expect a capture; with a path, write it there."""
        self.announced[name] = Path(path) if path else None

    def expects(self, name: str) -> bool:
        return self.everything or name in self.announced

    def take(self, name: str, states: Callable[[], States]) -> None:
        """Read states back now, while their blocks hold them, and write them later."""
        path = self.announced.pop(name, Path(name) if self.everything else None)
        self.found[name] = future = Future[States]()
        try:
            read = states()
        except Exception as error:
            future.set_exception(error)
            return
        if path is None:
            future.set_result(read)
        elif self.everything:
            _write(read, path, future)  # nobody waits for it, and the process may end
        else:
            self.thread.submit(_write, read, path, future)

    def state(self, name: str) -> str:
        """PENDING, nothing when it is done, or what went wrong; told once."""
        future = self.found.get(name)
        if future is None or not future.done():
            return PENDING
        error = self.found.pop(name).exception()
        return "" if error is None else str(error) or type(error).__name__

    def collect(self, name: str) -> States:
        """The states of a capture that has no file. Raises AwarenessError."""
        future = self.found.pop(name, None)
        if future is None:
            raise AwarenessError("nothing was captured", found=f"no states of {name}")
        if (error := future.exception()) is not None:
            raise AwarenessError("the states were not read back", found=error) from error
        return future.result()

    def forget(self, name: str) -> None:
        """A capture whose request came to nothing."""
        self.announced.pop(name, None)
        self.found.pop(name, None)


def as_memory(states: States, ids: list[int]) -> AlignedMemory:
    """Captured states as a memory for the model that they were captured from."""
    layers = range(len(states) // 2)
    keys, values = ([states[tensor_name(i, part)] for i in layers] for part in ("key", "value"))
    return AlignedMemory(ids, keys, values)


def _write(states: States, path: Path, done: Future[States]) -> None:
    """Write a file whole or not at all."""
    try:
        temporary = path.with_name(f".{path.name}")
        save_file(states, temporary)
        os.replace(temporary, path)
        done.set_result({})
    except Exception as error:
        done.set_exception(error)
