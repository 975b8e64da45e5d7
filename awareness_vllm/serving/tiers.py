"""The warm tier of aligned memories: in host memory, and in files that outlive the server."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from vllm.logger import init_logger

from awareness_vllm.align.paged import Latent
from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.files import put_in_place, scratch_folder, sweep
from awareness_vllm.kernels import largest
from awareness_vllm.packages.file import check_finite
from awareness_vllm.packages.origin import signature
from awareness_vllm.packages.store import digest_in
from awareness_vllm.serving.params import Key, is_of
from awareness_vllm.tensor_file import FileRefused, TensorFile, digest_of, parse_json, read_file

logger = init_logger("vllm.awareness.tiers")

Memory = AlignedMemory | Latent


class DiskTier:
    """A folder of aligned memories for one model's cache, bounded in bytes: the least recently used
    go first. A file that is not what its name says counts as missing.

    Files are named by what they were made of and by the sha256 of their bytes, signed with the
    home's key: whoever can write to the folder can take memories away, but add none.
    """

    def __init__(self, folder: Path, limit: int, model: str, dtype: torch.dtype) -> None:
        self.folder, self.limit, self.dtype = folder, limit, dtype
        self.about = (model, str(dtype))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning("aligned memories are not kept on disk: %s", error)
        sweep(folder)
        # Files are written beside the engine's steps: no request waits for a disk.
        self.thread = ThreadPoolExecutor(1, "awareness-disk")

    def stem(self, key: Key) -> str:
        """The beginning of a memory's file name: the package's digest, then a digest of its map, of
        the model and of the dtype."""
        package, wmatrix = key
        about = hashlib.sha256(json.dumps([*self.about, wmatrix]).encode()).hexdigest()[:32]
        return f"{package}.{about}"

    def path(self, key: Key, digest: str) -> Path:
        """The file of a memory whose bytes have this sha256."""
        stem = self.stem(key)
        return self.folder / f"{stem}.{signature(f'{stem} {digest}')}.aligned"

    def get(self, key: Key) -> AlignedMemory | None:
        """A memory in host memory, None where the folder has no unaltered file of it."""
        for path in self.folder.glob(f"{self.stem(key)}.*.aligned"):
            try:
                file = read_file(
                    path,
                    lambda header: None,
                    visit=functools.partial(check_finite, largest=largest(self.dtype)),
                )
                if path != self.path(key, file.digest):
                    raise FileRefused(f"a file of other bytes (sha256 {file.digest})")
                memory = _aligned_memory(file)
            except FileRefused as error:
                logger.warning("%s cannot be used and is dropped: %s", path, error)
                _remove(path)
            else:
                with contextlib.suppress(OSError):  # a folder that cannot be written to
                    os.utime(path)
                return memory
        return None

    def has(self, key: Key) -> bool:
        """Whether the folder has a file of a memory, altered or not."""
        return any(self.folder.glob(f"{self.stem(key)}.*.aligned"))

    def put(self, key: Key, memory: AlignedMemory) -> None:
        """Write a memory, soon."""
        self.thread.submit(self._put, key, memory)

    def drop(self, memory: str) -> bool:
        """Remove a memory, through whichever map; whether it was there."""
        paths = list(self.folder.glob(f"{digest_in(memory)}*.aligned"))
        return any([_remove(path) for path in paths])

    def _put(self, key: Key, memory: AlignedMemory) -> None:
        tensors = {
            f"{i}.{part}": state.contiguous()
            for part, states in (("key", memory.keys), ("value", memory.values))
            for i, state in enumerate(states)
        }
        try:
            with scratch_folder(self.folder) as scratch:
                draft = scratch / "memory"
                save_file(tensors, draft, {"ids": json.dumps(memory.ids)})
                path = self.path(key, digest_of(draft))
                put_in_place(draft, path)
            self._make_room(path)
        except (FileRefused, SafetensorError, OSError) as error:
            logger.warning("%s is not kept on disk: %s", key[0], error)

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used files until the others fit; the newest one stays."""
        files = [(path.stat(), path) for path in self.folder.glob("*.aligned") if path != newest]
        total = newest.stat().st_size + sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total <= self.limit:
                return
            _remove(path)
            total -= stat.st_size


def _aligned_memory(file: TensorFile) -> AlignedMemory:
    """The memory in a file that this tier wrote. Raises FileRefused."""
    ids, count = parse_json(file.header.metadata.get("ids", "")), len(file.buffers) // 2
    keys, values = ([file.tensor(f"{i}.{part}") for i in range(count)] for part in ("key", "value"))
    return AlignedMemory(ids, keys, values)


def _remove(path: Path) -> bool:
    """Remove a file; whether it was there and could be removed."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)
        return False
    return True


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
        keys = [key for key in self.memories if is_of(key, memory)]
        for key in keys:
            del self.memories[key]
            self.pinned.discard(key)
        return bool(keys)
