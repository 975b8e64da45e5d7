"""The warm tier of aligned memories: in host memory, and in files that outlive the server."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from vllm.logger import init_logger

from awareness_vllm.align.paged import Latent
from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.files import atomic_write, private_copy

logger = init_logger("vllm.awareness.tiers")

Key = tuple[str, str]
"""A memory's ID and its W-Matrix's digest: both name bytes, so tenants can share it."""
Memory = AlignedMemory | Latent


class DiskTier:
    """A folder of aligned memories for one model's cache, bounded in bytes: the least recently used
    go first. A file that cannot be read counts as missing."""

    def __init__(self, folder: Path, limit: int, model: str, dtype: torch.dtype) -> None:
        self.folder, self.limit = folder, limit
        self.about = (model, str(dtype))
        folder.mkdir(parents=True, exist_ok=True)
        # Files are written beside the engine's steps: no request waits for a disk.
        self.thread = ThreadPoolExecutor(1, "awareness-disk")

    def path(self, key: Key) -> Path:
        """A memory's file, named by its W-Matrix, model and dtype too."""
        memory, wmatrix = key
        about = hashlib.sha256(json.dumps([*self.about, wmatrix]).encode()).hexdigest()[:16]
        return self.folder / f"{memory}.{about}.aligned"

    def get(self, key: Key) -> AlignedMemory | None:
        """A memory in host memory, None where the folder has no readable file of it."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with private_copy(path) as copy, safe_open(copy, framework="pt") as file:
                ids = json.loads(file.metadata()["ids"])
                count = len(file.keys()) // 2
                keys, values = (
                    [file.get_tensor(f"{i}.{part}") for i in range(count)]
                    for part in ("key", "value")
                )
            os.utime(path)
            return AlignedMemory(ids, keys, values)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read and is dropped: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def put(self, key: Key, memory: AlignedMemory) -> None:
        """Write a memory, soon."""
        self.thread.submit(self._put, key, memory)

    def drop(self, memory: str) -> bool:
        """Remove a memory, through whichever map; whether it was there."""
        paths = list(self.folder.glob(f"{memory}.*.aligned"))
        for path in paths:
            path.unlink(missing_ok=True)
        return bool(paths)

    def _put(self, key: Key, memory: AlignedMemory) -> None:
        path = self.path(key)
        tensors = {
            f"{i}.{part}": state.contiguous()
            for part, states in (("key", memory.keys), ("value", memory.values))
            for i, state in enumerate(states)
        }
        try:
            with atomic_write(path) as draft:
                save_file(tensors, draft, {"ids": json.dumps(memory.ids)})
            self._make_room(path)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is not kept on disk: %s", key[0], error)

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used files until the others fit; the newest one stays."""
        files = [(path.stat(), path) for path in self.folder.glob("*.aligned") if path != newest]
        total = newest.stat().st_size + sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


class WarmTier:
    """Aligned memories in host memory, bounded in bytes: the least recently used go first; pinned
    ones stay, and so does the newest."""

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
        """Remove a memory, through whichever map; whether it was there."""
        keys = [key for key in self.memories if key[0] == memory]
        for key in keys:
            del self.memories[key]
            self.pinned.discard(key)
        return bool(keys)
