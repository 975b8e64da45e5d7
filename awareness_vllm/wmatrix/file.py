"""The `.wmatrix` file: a safetensors file that holds one learned map and what is known of it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.align.features import split_states
from awareness_vllm.errors import BadInput, WMatrixCorrupt
from awareness_vllm.files import private_copy
from awareness_vllm.geometry import Geometry, Strict, file_digest
from awareness_vllm.home import wmatrices_dir
from awareness_vllm.kernels import decode, encode
from awareness_vllm.packages.file import METADATA_KEY
from awareness_vllm.packages.payload import payload_digest

if TYPE_CHECKING:
    from awareness_vllm.wmatrix.certificate import Certificate

REGISTERED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Anchors(Strict):
    """What the map was learned from."""

    digest: str
    documents: int
    tokens: int


class WMatrixManifest(Strict):
    """The JSON document in a W-Matrix's safetensors metadata.

    `layers` are the source layers that the map reads; with `residual` the map gives what is to be
    added to the source's own states (variants of one model); without `predecessors` it reads the
    source's states alone, for packages without text; `places` are the sides whose learned position
    embeddings it reads; `sink` are the target's fixed first tokens; `r2` is the share of variance
    explained on held-out documents of the anchors' sources, `reconstruction_error` the share of the
    features' variance that the latent loses (None where nobody measured it); without `certificate`
    the map is not certified.
    `fit` is the configuration of the fit; `payload` is the sha256 over the other fields and the
    tensors; `composed` are the payloads of the maps that this one was folded from, in order.
    """

    format: Literal["awareness-wmatrix/1"] = "awareness-wmatrix/1"
    source: Geometry
    target: Geometry
    layers: tuple[int, ...]
    rank: int
    predecessors: int | None
    residual: bool = False
    places: tuple[Literal["source", "target"], ...] = ()
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
        return self.token_width + sum(width for _, width in self.place_shapes.values())

    @property
    def place_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes [P, E] of the tables of position embeddings."""
        sides = {"source": self.source, "target": self.target}
        return {s: (sides[s].max_positions, sides[s].hidden_size) for s in sorted(self.places)}

    @property
    def measured(self) -> Certificate | None:
        """The certificate, None where nobody measured the map. What is none as a whole (an older
        version's, or published figures that somebody filled in) certifies nothing."""
        from awareness_vllm.wmatrix.certificate import Certificate  # late: it needs this module

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


@dataclass(frozen=True)
class WMatrix:
    """The learned map. `mean` and `scale` [F] standardise features before `encode` [F, R];
    `decode` [R, O] and `bias` [O] give position-free target states; sinks are [S, H, D] as cached;
    `places` hold the position embeddings that are among the features.
    """

    manifest: WMatrixManifest
    mean: Tensor
    scale: Tensor
    encode: Tensor
    decode: Tensor
    bias: Tensor
    sink_keys: list[Tensor]
    sink_values: list[Tensor]
    places: dict[str, Tensor] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """Share of the target states' variance that the map explains on held-out documents; None
        where nobody measured it."""
        found = self.manifest.r2.values()
        return sum(found) / len(found) if found else None

    @property
    def reconstruction_error(self) -> float | None:
        """Share of the features' variance that is lost in a round trip through the latent."""
        return self.manifest.reconstruction_error

    @property
    def payload(self) -> str:
        """sha256 over manifest and tensors: what tells this map from others, saved or not."""
        return payload_digest(self.manifest.model_dump_json(), sorted(self._tensors().items()))

    def register(self, name: str) -> Path:
        """Save under a name in `$AWARENESS_HOME/wmatrices`; the file's path."""
        if not REGISTERED.fullmatch(name):
            raise BadInput("not a W-Matrix name", found=repr(name), expected=REGISTERED.pattern)
        path = wmatrices_dir() / f"{name}.wmatrix"
        self.save(path)
        return path

    def map(
        self, source: Tensor | None, embeddings: Tensor, blank: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Target states for each token, keys position-free.

        Args:
            source: [T, source_width] float32 at the aligned source tokens; None blanks all states.
            embeddings: [T, embedding_width] float32, position embeddings after tokens'.
            blank: [T] bool, rows whose source states say nothing.

        Returns:
            keys and values per target layer, [T, H, D] float32.
        """
        width = self.manifest.source_width
        features = torch.zeros(len(embeddings), len(self.mean), dtype=self.encode.dtype)
        if source is not None:
            scale = self.scale[:width]
            features[:, :width] = torch.addcmul(-self.mean[:width] * scale, source, scale)
        if blank is not None:
            features[blank.nonzero()[:, 0], :width] = 0
        features[:, width:] = (embeddings - self.mean[width:]) * self.scale[width:]
        flat = decode(encode(features, self.encode), self.decode, self.bias)
        if self.manifest.residual:
            flat += self.own_states(source, blank, len(flat))
        return split_states(self.manifest.target, flat)

    def own_states(self, source: Tensor | None, blank: Tensor | None, rows: int) -> Tensor:
        """What a residual map adds to, [rows, source_width]: the source's states, or their mean
        where they say nothing."""
        mean = self.mean[: self.manifest.source_width]
        if source is None:
            return mean.expand(rows, -1)
        return source if blank is None else torch.where(blank[:, None], mean, source)

    def place_latents(self) -> dict[str, Tensor]:
        """What each position adds to the latent, [P, R] of each side: the map is linear."""
        found, end = {}, self.manifest.source_width + self.manifest.token_width
        for side, table in sorted(self.places.items()):
            part = slice(end, end := end + table.shape[1])
            rows = (table - self.mean[part]) * self.scale[part]
            found[side] = rows.to(self.encode.dtype) @ self.encode[part]
        return found

    def save(self, path: str | Path) -> None:
        """Write the file atomically; the payload digest is put into the manifest here."""
        path = Path(path)
        tensors = self._tensors()
        manifest = self.manifest.model_copy(update={"payload": self.payload})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, {METADATA_KEY: manifest.model_dump_json()})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "mean": self.mean,
            "scale": self.scale,
            "encode": self.encode.contiguous(),
            "decode": self.decode.contiguous(),
            "bias": self.bias,
        }
        for i, (key, value) in enumerate(zip(self.sink_keys, self.sink_values, strict=True)):
            tensors[f"sink.{i}.key"] = key.contiguous()
            tensors[f"sink.{i}.value"] = value.contiguous()
        return tensors | {f"places.{side}": table for side, table in self.places.items()}


def load(path: str | Path) -> WMatrix:
    """Read and verify a W-Matrix.

    Raises:
        WMatrixCorrupt: unreadable, altered, or shapes that contradict its geometries.
    """
    path = Path(path)
    manifest = read_manifest(path)
    source, target = manifest.source, manifest.target
    try:
        with private_copy(path) as copy, safe_open(copy, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            document = file.metadata()[METADATA_KEY]
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, str(error)) from error
    if (payload := payload_digest(document, sorted(tensors.items()))) != manifest.payload:
        raise _corrupt(path, f"payload {payload}", manifest.payload)
    if not set(manifest.layers) <= set(range(len(source.layers))):
        raise _corrupt(path, f"source layers {manifest.layers}", f"0 … {len(source.layers) - 1}")
    if manifest.residual and manifest.source_width != target.width:
        raise _corrupt(path, f"a residual map of {manifest.source_width} states", target.width)
    features = manifest.source_width + manifest.embedding_width
    shapes = {
        "mean": (features,),
        "scale": (features,),
        "encode": (features, manifest.rank),
        "decode": (manifest.rank, target.width),
        "bias": (target.width,),
    }
    for i, layer in enumerate(target.layers):
        shape = (len(manifest.sink), layer.heads, layer.head_dim)
        shapes |= {f"sink.{i}.key": shape, f"sink.{i}.value": shape}
    shapes |= {f"places.{side}": shape for side, shape in manifest.place_shapes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        wrong = sorted(set(found.items()) ^ set(shapes.items()))
        raise _corrupt(path, f"tensors {wrong[:4]}", "the shapes of its geometries")
    count = len(target.layers)
    return WMatrix(
        manifest,
        mean=tensors["mean"],
        scale=tensors["scale"],
        encode=tensors["encode"],
        decode=tensors["decode"],
        bias=tensors["bias"],
        sink_keys=[tensors[f"sink.{i}.key"] for i in range(count)],
        sink_values=[tensors[f"sink.{i}.value"] for i in range(count)],
        places={side: tensors[f"places.{side}"] for side in manifest.place_shapes},
    )


def read_manifest(path: Path) -> WMatrixManifest:
    """A W-Matrix's manifest alone. Raises WMatrixCorrupt."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return WMatrixManifest.model_validate_json(metadata.get(METADATA_KEY, ""))
    except (SafetensorError, OSError, ValidationError, json.JSONDecodeError) as error:
        raise _corrupt(path, str(error)) from error


def is_readable(path: Path) -> bool:
    """Whether there is a W-Matrix that this version reads; an older version's is none."""
    try:
        read_manifest(path)
    except WMatrixCorrupt:
        return False
    return True


def digest_of(path: Path) -> str:
    """sha256 of the file: what aligned memories and cache salts are keyed by."""
    return file_digest(path)


def _corrupt(
    path: Path, found: str, expected: str | int = "a W-Matrix as `awareness fit` writes it"
) -> WMatrixCorrupt:
    return WMatrixCorrupt(
        f"W-Matrix {path.name} cannot be used",
        found=found,
        expected=expected,
        remedy="fit it again, or restore the file from where it came",
    )
