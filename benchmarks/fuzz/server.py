"""The product's ways of reading a file, as a server and the command line use them, on tiny models.

Each way is a function of no arguments that returns what it would serve, to be judged by `oracle`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from awareness_vllm.align.paged import Latent, PagedMap, Pages
from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.align.workspace import DeviceWorkspace
from awareness_vllm.kernels import largest
from awareness_vllm.packages import file as package_file
from awareness_vllm.packages.file import publish
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.connector.loader import MemoryLoader, PendingAlignment
from awareness_vllm.serving.params import Part
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tiers import DiskTier, Key, WarmTier
from awareness_vllm.wmatrix import manifest as wmatrix_manifest
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix
from awareness_vllm.wmatrix.registry import Registry
from fuzz.seeds import Seeds

TAIL, POSITIONS = 0, 512
Way = Callable[[], Any]


@dataclass
class Server:
    """The two halves of a server for the seeds' target, with a good package of each kind in its
    store, its W-Matrix and a disk-cache entry."""

    seeds: Seeds
    folder: Path
    good: dict[str, str] = field(default_factory=dict)
    """IDs by the packages' kinds."""

    def __post_init__(self) -> None:
        seeds, self.store = self.seeds, self.folder / "store"
        self.good = {k: publish(p, self.store).stem for k, p in seeds.packages.items()}
        self.map = self.folder / "good.wmatrix"
        seeds.wmatrix.save(self.map)
        self.int8 = self.folder / "int8.wmatrix"
        seeds.wmatrix.to_int8().save(self.int8)
        self.model = ServedModel(
            seeds.target, POSITIONS, seeds.geometry, seeds.prefix, largest(torch.bfloat16)
        )
        self.registry = Registry.read([self.map])
        self.digest = self.registry.entries[0].digest
        self.resolver = self.new_resolver(self.registry)
        self.loader = self.new_loader({self.digest: seeds.wmatrix})
        self.paged_loader = self.new_loader({self.digest: seeds.wmatrix}, paged=True)
        self.disk = DiskTier(self.folder / "disk", 2**30, "model", torch.bfloat16)
        self.entry: Key = self.plan(self.resolver, self.good["mapped"]).key
        self.disk.put(self.entry, self.serve(self.good["mapped"]))
        self.disk.thread.shutdown()
        (self.entry_path,) = self.disk.folder.iterdir()

    def new_resolver(self, registry: Registry) -> MemoryResolver:
        return MemoryResolver(self.model, {"": Store(self.store)}, registry, TAIL)

    def new_loader(self, maps: dict[str, WMatrix], paged: bool = False) -> MemoryLoader:
        """A worker's loader that keeps nothing: each load reads its file; `paged` as on CUDA."""
        loader = MemoryLoader(self.model, {"": Store(self.store)}, torch.bfloat16, WarmTier(0))
        loader.wmatrices = maps
        loader.embed = lambda ids: self.seeds.embedding[ids]
        heads = {i: slice(None) for i in range(len(self.model.geometry.layers))}
        if paged:
            workspace = DeviceWorkspace("cpu", POSITIONS)
            loader.paged = {d: PagedMap(w, heads, workspace) for d, w in maps.items()}
        return loader

    def load(self, part: Part, loader: MemoryLoader | None = None) -> Any:
        """A memory by the loader's own steps, in this thread."""
        loader = loader or self.loader
        source: Future[Any] = Future()
        source.set_result(loader.read_source(part, ""))
        alignment = PendingAlignment(part, source)
        while not loader.step(alignment):
            wait(alignment.running)
        loader.warm.memories.clear()
        memory = alignment.result.result()[0]
        if isinstance(memory, Latent):
            return self.decoded(memory, loader.paged[part.wmatrix])
        return memory

    def decoded(self, latent: Latent, paged: PagedMap) -> AlignedMemory:
        """What a latent puts into pages."""
        slots = torch.arange(len(latent.ids))
        pages = []
        for layer in self.model.geometry.layers:
            shape = (1, len(slots), layer.heads, layer.head_dim)
            pages.append(Pages(*(torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))))
        paged.write(latent, pages, [slots] * len(pages), begin=0)
        return AlignedMemory(latent.ids, [p.keys[0] for p in pages], [p.values[0] for p in pages])

    def resolve(self, memory: str) -> ResolvedMemory:
        return self.new_resolver(self.registry).resolve_one(memory, "")

    def serve(self, memory: str, loader: MemoryLoader | None = None) -> Any:
        """A memory from its ID to its states, by both halves."""
        return self.load(self.plan(self.resolver, memory), loader)

    def plan(self, resolver: MemoryResolver, memory: str) -> Part:
        params = resolver.resolve(MemoryRequest(ids=(memory,)), "").params
        assert params is not None
        return params.parts[0]

    def package_ways(self, path: Path, memory: str) -> dict[str, Way]:
        return {
            "packages.manifest.read_manifest": lambda: read_manifest(path),
            "packages.file.read": lambda: package_file.read(path),
            "packages.file.verify": lambda: package_file.verify(path),
            "MemoryResolver.resolve": lambda: self.resolve(memory),
            "serve": lambda: self.serve(memory),
            "serve on CUDA": lambda: self.serve(memory, self.paged_loader),
            "awareness inspect": lambda: command("inspect", str(path)),
            "awareness verify": lambda: command("verify", str(path)),
            "awareness list": lambda: command("list", store=self.store),
        }

    def wmatrix_ways(self, path: Path) -> dict[str, Way]:
        return {
            "wmatrix.manifest.read_manifest": lambda: wmatrix_manifest.read_manifest(path),
            "wmatrix.file.load": lambda: load_wmatrix(path),
            "Registry.read": lambda: self.listed(path),
            "serve": lambda: self.serve_through(path),
            "serve on CUDA": lambda: self.serve_through(path, paged=True),
            "serve with a quality target": lambda: self.resolve_through(path, 0.5),
            "awareness inspect": lambda: command("inspect", str(path)),
            "awareness verify": lambda: command("verify", str(path)),
        }

    def listed(self, path: Path) -> Any:
        """The maps of a folder; one that cannot be used hides no other."""
        entries = Registry.read([path.parent]).entries
        return [(entry.certificate, entry.manifest.standing) for entry in entries]

    def serve_through(self, path: Path, paged: bool = False) -> Any:
        """The good package through a map, from the server's start on."""
        registry = Registry.read([path])
        maps = {entry.digest: load_wmatrix(entry.path) for entry in registry}
        loader = self.new_loader(maps, paged)
        return self.load(self.plan(self.new_resolver(registry), self.good["mapped"]), loader)

    def resolve_through(self, path: Path, quality: float) -> tuple[Prompt, Any]:
        """The plan and the report of a request with a quality target."""
        request = MemoryRequest(ids=(self.good["mapped"],), quality_target=quality)
        prompt = self.new_resolver(Registry.read([path])).resolve(request, "")
        return prompt, prompt.report()


def command(name: str, what: str | None = None, store: Path | None = None) -> dict[str, Any]:
    """What a subcommand of `awareness` prints as JSON."""
    module = importlib.import_module(f"awareness_vllm.cli.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    flags = [what] if what else []
    return module.run(parser.parse_args([*flags, *(["--store", str(store)] if store else [])]))
