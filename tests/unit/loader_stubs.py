"""A worker's loader whose files are read, and whose blocks are aligned, when a test says so."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.store import Store, digest_in
from awareness_vllm.serving.connector.loader import LoadedSource, MemoryLoader, PendingAlignment
from awareness_vllm.serving.params import Part
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tiers import WarmTier

ALIGNED = AlignedMemory([1, 2, 3], [torch.zeros(3, 1, 2)], [torch.ones(3, 1, 2)])
SECONDS = 30.0


def part(name: str = "mem", wmatrix: str = "map") -> Part:
    return Part(memory=name, digest=digest_in(name), wmatrix=wmatrix, tokens=3)


class StubAlignment:
    """Memories whose files are read once `go_on` is set, and that take `needed` blocks to align."""

    def __init__(self, loader: MemoryLoader, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.read: list[str] = []
        self.blocks: list[str] = []
        self.needed = 1
        self.bytes = 10
        self.error: Exception | None = None
        monkeypatch.setattr(loader, "source_bytes", lambda part, tenant: self.bytes)
        monkeypatch.setattr(loader, "read_source", self.read_source)
        monkeypatch.setattr(loader, "align_block", self.align_block)

    def read_source(self, part: Part, tenant: str) -> LoadedSource:
        self.read.append(part.memory)
        assert self.go_on.wait(SECONDS)
        if self.error:
            raise self.error
        return LoadedSource("cold")

    def align_block(
        self, alignment: PendingAlignment, source: LoadedSource
    ) -> AlignedMemory | None:
        self.blocks.append(alignment.part.memory)
        return ALIGNED if self.blocks.count(alignment.part.memory) >= self.needed else None


def loader_of(folder: Path, geometry: Geometry, store: Path) -> MemoryLoader:
    """A loader with one store for all."""
    model = ServedModel(folder, 1000, geometry)
    return MemoryLoader(model, {"": Store(store)}, torch.bfloat16, WarmTier(2**30))
