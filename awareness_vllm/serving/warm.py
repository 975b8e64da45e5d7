"""The warm tier: aligned memories in host memory."""

from __future__ import annotations

from collections import OrderedDict

from awareness_vllm.align.aligner import AlignedMemory
from awareness_vllm.align.paged import Latent

Key = tuple[str, str]
"""A memory's ID and its W-Matrix's digest: both name bytes, so tenants can share it."""
Memory = AlignedMemory | Latent


class WarmTier:
    """Least recently used out first, bounded in bytes; what is pinned stays, and so does the one
    that came last."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.memories: OrderedDict[Key, Memory] = OrderedDict()
        self.pinned: set[Key] = set()

    def get(self, key: Key) -> Memory | None:
        if key in self.memories:
            self.memories.move_to_end(key)
        return self.memories.get(key)

    def put(self, key: Key, memory: Memory) -> None:
        self.memories[key] = memory
        self.memories.move_to_end(key)
        total = sum(m.bytes for m in self.memories.values())
        for old in [k for k in self.memories if k not in self.pinned and k != key]:
            if total <= self.limit:
                return
            total -= self.memories.pop(old).bytes

    def drop(self, memory: str) -> bool:
        """Forget a memory, through whichever map; whether it was there."""
        keys = [key for key in self.memories if key[0] == memory]
        for key in keys:
            del self.memories[key]
            self.pinned.discard(key)
        return bool(keys)
