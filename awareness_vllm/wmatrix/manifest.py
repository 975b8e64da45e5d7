"""The manifest of a `.wmatrix` file; reading it needs no torch."""

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
    """The texts that a map was learned from: `tokens` of the target in so many `documents`."""

    digest: str
    documents: int
    tokens: int


class WMatrixManifest(FrozenModel):
    """The JSON document in a W-Matrix's safetensors metadata.

    `layers` are the source layers that the map reads; with `residual` its outputs are added to
    the source's own states (variants of one model); without `predecessors` it reads the source's
    states alone, for packages without text; `position_embeddings` are the sides whose learned
    positions it reads; `sink` are the target's fixed first tokens; `r2` is the share of variance
    explained on held-out documents of the anchors' sources, `reconstruction_error` the share of
    the features' variance that the latent loses (None where not measured); without `certificate`
    the map is not certified. `fit` is the configuration of the fit; `payload` is the sha256 over
    the other fields and the tensors; `composed` are the payloads of the maps that this one was
    composed of, in order.
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
        """Elements of source states that the map reads for one token."""
        return self.source.width_of(self.layers)

    @property
    def reads_tokens(self) -> bool:
        """Whether the map reads the target's tokens of the text, not the source's states alone."""
        return self.predecessors is not None

    @property
    def token_width(self) -> int:
        """Elements of the target's embeddings that the map reads for one token."""
        return 0 if self.predecessors is None else (1 + self.predecessors) * self.target.hidden_size

    @property
    def embedding_width(self) -> int:
        """`token_width` with the position embeddings."""
        return self.token_width + sum(width for _, width in self.position_embedding_shapes.values())

    @property
    def position_embedding_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes [P, E] of the tables of position embeddings, by side."""
        sides = {"source": self.source, "target": self.target}
        return {
            s: (sides[s].max_positions, sides[s].hidden_size)
            for s in sorted(self.position_embeddings)
        }

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the file's tensors, by name."""
        features, outputs = self.source_width + self.embedding_width, self.target.width
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (features,),
            "scale": (features,),
            "encode": (features, self.rank),
            "decode": (self.rank, outputs),
            "bias": (outputs,),
        }
        for i, layer in enumerate(self.target.layers):
            shape = (len(self.sink), layer.heads, layer.head_dim)
            shapes |= {f"sink.{i}.key": shape, f"sink.{i}.value": shape}
        tables = self.position_embedding_shapes
        return shapes | {f"position_embeddings.{side}": tables[side] for side in tables}

    @property
    def measured(self) -> Certificate | None:
        """The certificate, None where the map is not certified: an incomplete certificate (an older
        version's, or published figures alone) certifies nothing."""
        try:
            return Certificate.model_validate(self.certificate)
        except ValidationError:
            return None

    @property
    def standing(self) -> str:
        """The certified figures in one line."""
        if (certificate := self.measured) is None:
            return "not certified"
        return (
            f"certified: retention {certificate.retention.mean:.3f}, "
            f"facts {certificate.facts.mean:.2f} of native"
        )


def read_manifest(path: Path) -> WMatrixManifest:
    """A W-Matrix's manifest alone. Raises WMatrixCorrupt."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        return WMatrixManifest.model_validate_json(metadata.get(METADATA_KEY, ""))
    except (SafetensorError, OSError, ValidationError) as error:
        raise corrupt_wmatrix(path, str(error)) from error


def corrupt_wmatrix(
    path: Path, found: str, expected: str | int = "a W-Matrix as `awareness fit` writes it"
) -> WMatrixCorrupt:
    """The error about a W-Matrix file that cannot be used."""
    return WMatrixCorrupt(
        f"W-Matrix {path.name} cannot be used",
        found=found,
        expected=expected,
        remedy="fit it again, or restore the file from where it came",
    )
