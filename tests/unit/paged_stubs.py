"""A map on a CPU "device", with pages as vLLM's CUDA backends lay them out."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from awareness_vllm.align.encoding import LatentEncoding
from awareness_vllm.align.paged import Latent, PagedMap, Pages
from awareness_vllm.align.realign import sources
from awareness_vllm.align.workspace import DeviceWorkspace, SideStream
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.features import Embed
from awareness_vllm.wmatrix.file import WMatrix

SIZE = 4
EMPTY = 7.0


def embed(ids: Tensor) -> Tensor:
    return torch.randn(1000, 6, generator=torch.Generator().manual_seed(3))[ids]


def paged_map(
    wmatrix: WMatrix, chunk_rows: int = 64, workspace: DeviceWorkspace | None = None
) -> PagedMap:
    """A map of one KV head per layer, in chunks of so many rows."""
    heads = {i: slice(0, 1) for i in range(len(wmatrix.manifest.target.layers))}
    paged = PagedMap(wmatrix, heads, workspace or DeviceWorkspace("cpu", 64))
    paged.chunk_rows = chunk_rows
    return paged


def encoding_of(paged: PagedMap, package: Package, folder: Path, embed: Embed) -> LatentEncoding:
    ids, source = sources(package, paged.manifest, folder)
    return LatentEncoding(paged, package.keys, package.values, ids, source, embed)


def latent_of(paged: PagedMap, package: Package, folder: Path, embed: Embed) -> Latent:
    """A package's latent, after as many steps as it takes."""
    encoding = encoding_of(paged, package, folder, embed)
    while not encoding.step():
        wait(encoding.awaited)
    return encoding.memory


def empty_pages(layers: int, pages: int) -> list[Pages]:
    """As vLLM's CUDA backends lay them out: [B, H, N, K|V], seen as two of [B, N, H, D]."""
    caches = [torch.full((pages, 1, SIZE, 8), EMPTY) for _ in range(layers)]
    return [Pages(*cache.transpose(1, 2).split(4, dim=-1)) for cache in caches]


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors' memory that operators have allocated and not freed yet, beside
    some tensors that were there before."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.known:
            return
        self.known.add(address)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self.free, address, size)

    def free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


class Recorder(SideStream):
    """A stream that notes what it was asked for; marks are numbers."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(torch.device("cpu"))
        self.log, self.marks, self.inside = log, 0, False

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def note(self, what: str, mark: Any) -> None:
        if mark is not None:
            self.log.append(f"{what} {mark}")

    def mark(self) -> Any:
        self.marks += 1
        self.note("mark", f"upload {self.marks}")
        return f"upload {self.marks}"

    def mark_engine(self) -> Any:
        self.marks += 1
        self.note("mark", f"use {self.marks}")
        return f"use {self.marks}"

    def follow(self, mark: Any) -> None:
        assert self.inside
        self.note("stream waits for", mark)

    def hold_engine(self, mark: Any) -> None:
        assert not self.inside
        self.note("engine waits for", mark)

    def wait(self, mark: Any) -> None:
        self.note("host waits for", mark)
