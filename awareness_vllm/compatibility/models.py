"""The two ends of a transfer: models by folder, by the name that W-Matrices know, or published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.compatibility.priors import known_name
from awareness_vllm.errors import BadInput
from awareness_vllm.models.describe import geometry_of, is_model_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.registry import Registry


@dataclass(frozen=True)
class Model:
    """A model that was asked about; without geometry it is known by its published name alone."""

    name: str
    geometry: Geometry | None


def model(given: str | Path, registry: Registry) -> Model:
    """A model by its folder or a name.

    Raises:
        BadInput: nobody knows the name, or several models of the W-Matrices have it;
        UnsupportedModel: a folder that cannot be used.
    """
    if is_model_folder(given):
        geometry = geometry_of(given)
        return Model(geometry.name, geometry)
    known = registry.models()
    found = [geometry for geometry in known if geometry.name == str(given)]
    if len(found) > 1:
        raise BadInput(
            f"{len(found)} models of the W-Matrices are named {str(given)!r}",
            found=registry,
            remedy="give the model's folder",
        )
    if found:
        return Model(found[0].name, found[0])
    return Model(known_name(str(given), {geometry.name for geometry in known}), None)
