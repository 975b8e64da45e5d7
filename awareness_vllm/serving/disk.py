"""The warm tier's second half: aligned memories in files, read instead of being aligned again."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from vllm.logger import init_logger

from awareness_vllm.align.aligner import AlignedMemory
from awareness_vllm.files import private_copy
from awareness_vllm.serving.warm import Key

logger = init_logger("vllm.awareness.disk")


class DiskTier:
    """A folder of aligned memories for one model's cache, least recently used out first, bounded in
    bytes. What cannot be read is as good as not there."""

    def __init__(self, folder: Path, limit: int, model: str, dtype: torch.dtype) -> None:
        self.folder, self.limit = folder, limit
        self.about = (model, str(dtype))
        folder.mkdir(parents=True, exist_ok=True)
        # Files are written beside the engine's steps: no request waits for a disk.
        self.thread = ThreadPoolExecutor(1, "awareness-disk")

    def path(self, key: Key) -> Path:
        """A file's name says whose states it holds, for which model and dtype."""
        memory, wmatrix = key
        about = hashlib.sha256(json.dumps([*self.about, wmatrix]).encode()).hexdigest()[:16]
        return self.folder / f"{memory}.{about}.aligned"

    def get(self, key: Key) -> AlignedMemory | None:
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
        """Forget a memory; whether it was there."""
        found = list(self.folder.glob(f"{memory}.*.aligned"))
        for path in found:
            path.unlink(missing_ok=True)
        return bool(found)

    def _put(self, key: Key, memory: AlignedMemory) -> None:
        path = self.path(key)
        temporary = path.with_suffix(f".{os.getpid()}")
        tensors = {
            f"{i}.{part}": state.contiguous()
            for part, states in (("key", memory.keys), ("value", memory.values))
            for i, state in enumerate(states)
        }
        try:
            save_file(tensors, temporary, {"ids": json.dumps(memory.ids)})
            os.replace(temporary, path)
            self._make_room(path)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is not kept on disk: %s", key[0], error)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used files until the others fit; the newest one stays."""
        files = [(path.stat(), path) for path in self.folder.glob("*.aligned") if path != newest]
        total = newest.stat().st_size + sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda found: found[0].st_mtime_ns):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
