"""The models of a transfer: by folder, by their name in the W-Matrices, or by a published name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from awareness_vllm.compatibility.priors import known_name, published_geometry
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.registry import Registry


class Listing(Protocol):
    """An offer, if it names the model that it comes from."""

    @property
    def source_model(self) -> str: ...


@dataclass(frozen=True)
class Model:
    """A model; without geometry it is known by its published name alone."""

    name: str
    geometry: Geometry | None

    @property
    def shape(self) -> Geometry | None:
        """The geometry, or that of the published architecture (a prior); None without either."""
        return self.geometry or published_geometry(self.name)


def model(name: str | Path, registry: Registry) -> Model:
    """A model by its folder or a name.

    Raises:
        BadInput: an unknown name, or one that several models of the W-Matrices have.
        UnsupportedModel: a folder that cannot be used.
    """
    geometry = registry.model(name)
    if geometry is not None:
        return Model(geometry.name, geometry)
    return Model(known_name(str(name), {known.name for known in registry.models()}), None)
