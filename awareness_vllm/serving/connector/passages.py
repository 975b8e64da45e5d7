"""A worker's re-read passages: the rows that the model itself has computed, for later loads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from awareness_vllm.errors import PassageMissing
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.params import Passage, is_of


@dataclass(frozen=True)
class PassageRows:
    """A passage's keys and values [T, H, D] as cached at the memory's own positions, by the index
    of each layer of this worker; H are the heads of its rank."""

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    @classmethod
    def of(cls, states: Mapping[str, Tensor]) -> PassageRows:
        """The rows from states that were read back, by the names of their tensors."""
        layers = [int(name.split(".")[1]) for name in states if name.endswith("key")]
        keys, values = (
            {i: states[tensor_name(i, part)] for i in layers} for part in ("key", "value")
        )
        return cls(keys, values)

    @property
    def bytes(self) -> int:
        states = (*self.keys.values(), *self.values.values())
        return sum(state.numel() * state.element_size() for state in states)


class PassageTier:
    """Passages in host memory, bounded in bytes: the least recently used go first, never the newest
    one."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.rows: OrderedDict[Passage, PassageRows] = OrderedDict()

    def put(self, passage: Passage, rows: PassageRows) -> None:
        self._remove(passage)
        self.rows[passage] = rows
        self.bytes += rows.bytes
        while self.bytes > self.limit and len(self.rows) > 1:
            self._remove(next(iter(self.rows)))

    def get(self, passage: Passage) -> PassageRows:
        """Raises PassageMissing: it was dropped, or never kept."""
        if passage not in self.rows:
            raise PassageMissing(
                "a passage that was to be laid over is not here",
                found=f"no rows of positions {passage[1]}",
                expected="rows that the model has computed",
                remedy="ask again, or start the server with a larger --reread-cache-gib",
            )
        self.rows.move_to_end(passage)
        return self.rows[passage]

    def drop(self, memory: str) -> None:
        """Remove a memory's passages, through whichever map."""
        for passage in [passage for passage in self.rows if is_of(passage[0], memory)]:
            self._remove(passage)

    def _remove(self, passage: Passage) -> None:
        if (rows := self.rows.pop(passage, None)) is not None:
            self.bytes -= rows.bytes
