"""A worker's editions in the making: the model's own states of a memory, chunk by chunk."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.logger import init_logger

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import AwarenessError
from awareness_vllm.serving.connector.capture_queue import CaptureQueue, States, keys_and_values
from awareness_vllm.serving.connector.kv_layout import KVLayout
from awareness_vllm.serving.connector.loader import MemoryLoader
from awareness_vllm.serving.connector.scheduler import MIN_COMPUTED
from awareness_vllm.serving.params import Key

logger = init_logger("vllm.awareness.editions")

MAX_DRAFTS = 8
"""Editions in the making, one of each front end: beyond, the one that waits longest is given up."""
MADE, FAILED = "made", "failed"


@dataclass
class Draft:
    """An edition of which positions 0 … read-1 are read: by the names of its tensors the chunks
    that a request after them may see, each with its first position."""

    layout: KVLayout
    read: int = 0
    chunks: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def extend(self, states: States, begin: int) -> None:
        """Add the states of positions from `begin` on, which follow what is read.

        Raises:
            AwarenessError: they do not.
        """
        if begin != self.read:
            raise AwarenessError(
                "a chunk does not follow the one before",
                found=f"positions from {begin} on",
                expected=f"from {self.read} on",
            )
        self.read += len(next(iter(states.values())))
        first = self.layout.first_rows(self.read, MIN_COMPUTED)
        for name, rows in states.items():
            chunks = self.chunks.setdefault(name, [])
            chunks.append((begin, rows))
            while chunks[0][0] + len(chunks[0][1]) <= first[layer_of(name)]:
                del chunks[0]

    def memory(self, ids: list[int]) -> AlignedMemory:
        """The memory of what is read, which has these ids; of each layer the rows that a request
        may see. Raises AwarenessError: other ids than so many."""
        if self.read != len(ids):
            raise AwarenessError(
                "the edition is not read so far",
                found=f"{self.read} tokens",
                expected=f"{len(ids)}",
            )
        first = self.layout.first_rows(self.read, MIN_COMPUTED)
        states: States = {}
        for name, chunks in self.chunks.items():
            rows = torch.cat([rows for _, rows in chunks])
            kept = rows[first[layer_of(name)] - chunks[0][0] :]
            # A slice would hold on to all rows.
            states[name] = kept if len(kept) == len(rows) else kept.clone()
        return AlignedMemory(ids, *keys_and_values(states, len(states) // 2))


def layer_of(name: str) -> int:
    """The index of the layer in a tensor's name."""
    return int(name.split(".")[1])


class EditionDrafts:
    """Editions that front ends have the model read, by a name that each of them makes up; `counts`
    says how many came to an end since they were last taken, and how."""

    def __init__(self, loader: MemoryLoader, captures: CaptureQueue, layout: KVLayout) -> None:
        self.loader, self.captures, self.layout = loader, captures, layout
        self.drafts: OrderedDict[str, Draft] = OrderedDict()
        self.counts: dict[str, int] = {}

    def have(self, keys: Sequence[Key]) -> list[bool]:
        """Which editions this worker keeps."""
        return [self.loader.has_edition(key) for key in keys]

    def extend(self, name: str, capture: str, begin: int) -> str:
        """Add a captured chunk to an edition, which begins with the chunk at 0; the error's
        message, or ""."""
        return _message(functools.partial(self._extend, name, capture, begin))

    def _extend(self, name: str, capture: str, begin: int) -> None:
        states = self.captures.collect(capture)
        if not begin:
            self.drafts[name] = Draft(self.layout)
        while len(self.drafts) > MAX_DRAFTS:
            self.drop(next(iter(self.drafts)))
        self._draft(name).extend(states, begin)
        self.drafts.move_to_end(name)

    def hold(self, name: str, ids: list[int]) -> str:
        """Have what is read of an edition, which has these ids, loaded by the requests that read it
        on; the error's message, or ""."""
        return _message(functools.partial(self._hold, name, ids))

    @torch.inference_mode()
    def _hold(self, name: str, ids: list[int]) -> None:
        self.loader.keep_head(name, self._draft(name).memory(ids))

    def finish(self, name: str, key: Key, ids: list[int], tenant: str) -> str:
        """Keep an edition that has been read; the error's message, or ""."""
        error = _message(functools.partial(self._finish, name, key, ids, tenant))
        self.drop(name, failed=bool(error))
        return error

    @torch.inference_mode()
    def _finish(self, name: str, key: Key, ids: list[int], tenant: str) -> None:
        edition = self._draft(name).memory(ids)
        self.loader.keep_edition(key, edition, tenant)
        self._count(MADE)
        logger.info(
            "edition of mem_%s: %d tokens, %.1f MiB", key[0][:32], len(ids), edition.bytes / 2**20
        )

    def drop(self, name: str, *, failed: bool = False) -> None:
        """Give an edition in the making up."""
        self.drafts.pop(name, None)
        self.loader.heads.pop(name, None)
        if failed:
            self._count(FAILED)

    def take_counts(self) -> dict[str, int]:
        """What came of editions since the last call, and, where something did, the bytes kept."""
        counts, self.counts = self.counts, {}
        kept = self.loader.editions.memories.values()
        return {**counts, "bytes": sum(edition.bytes for edition in kept)} if counts else {}

    def _draft(self, name: str) -> Draft:
        if (draft := self.drafts.get(name)) is None:
            raise AwarenessError(
                "the edition's first chunks are gone",
                found="a restart, or too many editions in the making",
                expected="the chunks in order",
            )
        return draft

    def _count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1


def _message(work: Callable[[], None]) -> str:
    """What work ended in: "" or the error's message, since an exception would cross the engine as a
    mere text."""
    try:
        work()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""
