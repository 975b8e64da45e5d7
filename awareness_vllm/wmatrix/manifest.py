"""What a `.wmatrix` file says about itself; reading that needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError
from safetensors import SafetensorError, safe_open

from awareness_vllm.errors import WMatrixCorrupt
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.manifest import METADATA_KEY
from awareness_vllm.schema import FrozenModel
from awareness_vllm.wmatrix.certificate import Certificate


class Anchors(FrozenModel):
    """What the map was learned from."""

    digest: str
    documents: int
    tokens: int


class WMatrixManifest(FrozenModel):
    """The JSON document in a W-Matrix's safetensors metadata.

    `layers` are the source layers that the map reads; with `residual` the map gives what is to
    be added to the source's own states (variants of one model); without `predecessors` it reads
    the source's states alone, for packages without text; `position_embeddings` are the sides
    whose learned positions it reads; `sink` are the target's fixed first tokens; `r2` is the
    share of variance explained on held-out documents of the anchors' sources,
    `reconstruction_error` the share of the features' variance that the latent loses (None where
    nobody measured it); without `certificate` the map is not certified. `fit` is the
    configuration of the fit; `payload` is the sha256 over the other fields and the tensors;
    `composed` are the payloads of the maps that this one was folded from, in order.
    """

    format: Literal["awareness-wmatrix/1"] = "awareness-wmatrix/1"
    source: Geometry
    target: Geometry
    layers: tuple[int, ...]
    rank: int
    predecessors: int | None
    residual: bool = False
    position_embeddings: tuple[Literal["source", "target"], ...] = Field(
        (), validation_alias=AliasChoices("position_embeddings", "places")
    )
    sink: tuple[int, ...]
    anchors: Anchors
    fit: dict[str, float | int | str | None]
    r2: dict[str, float]
    reconstruction_error: float | None = None
    composed: tuple[str, ...] = ()
    versions: dict[str, str]
    certificate: dict[str, Any] | None = None
    payload: str = ""

    @property
    def source_width(self) -> int:
        """Numbers of source state that the map reads for one token."""
        return self.source.width_of(self.layers)

    @property
    def reads_tokens(self) -> bool:
        """Whether the map reads the target's tokens of the text, beside the source's states."""
        return self.predecessors is not None

    @property
    def token_width(self) -> int:
        """Numbers of the target's embeddings that the map reads for one token."""
        return 0 if self.predecessors is None else (1 + self.predecessors) * self.target.hidden_size

    @property
    def embedding_width(self) -> int:
        """The same, with the position embeddings."""
        return self.token_width + sum(width for _, width in self.position_embedding_shapes.values())

    @property
    def position_embedding_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes [P, E] of the tables of position embeddings."""
        sides = {"source": self.source, "target": self.target}
        return {
            s: (sides[s].max_positions, sides[s].hidden_size)
            for s in sorted(self.position_embeddings)
        }

    @property
    def measured(self) -> Certificate | None:
        """The certificate, None where nobody measured the map. What is none as a whole (an older
        version's, or published figures that somebody filled in) certifies nothing."""
        try:
            return Certificate.model_validate(self.certificate)
        except ValidationError:
            return None

    @property
    def standing(self) -> str:
        """What is known of the map's worth, in a few words."""
        if (found := self.measured) is None:
            return "not certified"
        return (
            f"certified: retention {found.retention.mean:.3f}, "
            f"facts {found.facts.mean:.2f} of native"
        )


def read_manifest(path: Path) -> WMatrixManifest:
    """A W-Matrix's manifest alone. Raises WMatrixCorrupt."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        return WMatrixManifest.model_validate_json(metadata.get(METADATA_KEY, ""))
    except (SafetensorError, OSError, ValidationError) as error:
        raise corrupt(path, str(error)) from error


def is_readable(path: Path) -> bool:
    """Whether there is a W-Matrix that this version reads; an older version's is none."""
    try:
        read_manifest(path)
    except WMatrixCorrupt:
        return False
    return True


def corrupt(
    path: Path, found: str, expected: str | int = "a W-Matrix as `awareness fit` writes it"
) -> WMatrixCorrupt:
    return WMatrixCorrupt(
        f"W-Matrix {path.name} cannot be used",
        found=found,
        expected=expected,
        remedy="fit it again, or restore the file from where it came",
    )
