"""A package, and its latents of one map, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from random_maps import random_map
from torch import Tensor

from awareness_vllm.align.latent import to_latent
from awareness_vllm.align.realign import (
    AlignedMemory,
    realign,
)
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.hf import load_model
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import (
    AnyPackage,
    Package,
    publish,
    verify,
)
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry

TEXT = " ".join(["The quick brown fox jumps over the lazy dog, and others look on."] * 70)
"""More than one block of the target's tokens."""
RANK = 6


Embed = Callable[[Tensor], Tensor]


class Pair(NamedTuple):
    """A map between two tiny models, a package of the source, and a `store` with the package, its
    latents as they are and in int8, and the map."""

    source: Path
    target: Path
    map: WMatrix
    embed: Embed
    package: Package
    store: Path
    ids: dict[str, str]

    def path(self, name: str) -> Path:
        return self.store / f"{self.ids[name]}.safetensors"

    def latent(self, name: str = "latent") -> LatentPackage:
        latent = verify(self.path(name))
        assert isinstance(latent, LatentPackage)
        return latent

    def realign(self, package: AnyPackage, wmatrix: WMatrix | None = None) -> AlignedMemory:
        """As a server does, but for what is in a latent already."""
        embed = self.embed if isinstance(package, Package) else no_embedding
        dtype = torch.bfloat16
        return realign(package, wmatrix or self.map, self.target, embed, dtype=dtype)

    def resolver(self, store: Path) -> MemoryResolver:
        registry = Registry.read([self.store / "pair.wmatrix"])
        return MemoryResolver(ServedModel.read(self.target, 2000), {"": Store(store)}, registry, 5)


def no_embedding(ids: Tensor) -> Tensor:
    raise AssertionError("the target's embeddings are in the latent already")


def make_pair(source: Path, target: Path, store: Path) -> Pair:
    """A map between two models in an empty store, with a package and its latents."""
    random = random_map(geometry_of(source), geometry_of(target), RANK)
    # As `fit` has them.
    products = random.encode.bfloat16(), random.decode.bfloat16()
    wmatrix = replace(random, encode=products[0], decode=products[1])
    wmatrix.save(store / "pair.wmatrix")
    embedding = load_model(target, torch.bfloat16).get_input_embeddings()

    def embed(ids: Tensor) -> Tensor:
        return embedding(ids).float()

    package = capture(source, TEXT, name="many words")
    ids = {"plain": publish(package, store).stem}
    for name, int8 in (("latent", False), ("int8", True)):
        latent = to_latent(package, wmatrix, target, embed, package_id=ids["plain"], int8=int8)
        ids[name] = publish(latent, store).stem
    return Pair(source, target, wmatrix, embed, package, store, ids)
