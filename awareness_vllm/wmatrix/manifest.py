"""The manifest of a `.wmatrix` file; reading it needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AliasChoices, Field

from awareness_vllm.errors import WMatrixCorrupt, escaped
from awareness_vllm.models.geometry import MAX_LAYERS, Geometry
from awareness_vllm.packages.manifest import METADATA_KEY, STATE_DTYPES
from awareness_vllm.passages import BUDGET
from awareness_vllm.schema import FrozenModel, PlainName
from awareness_vllm.tensor_file import (
    FileRefused,
    Header,
    parse_document,
    read_file,
    read_header,
)
from awareness_vllm.wmatrix.certificate import TAIL, Certificate, parse_certificate, statement
from awareness_vllm.wmatrix.plans import with_tail

PRODUCTS = ("encode", "decode")
"""The factors of the map's matrix product, which may be of a shorter dtype than the rest."""
PRODUCT_DTYPES = STATE_DTYPES
Index = Annotated[int, Field(ge=0)]


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
    composed of, in order; `quantization` is how the file stores `encode` and `decode`, where not in
    a dtype of PRODUCT_DTYPES.
    """

    format: Literal["awareness-wmatrix/1"] = "awareness-wmatrix/1"
    source: Geometry
    target: Geometry
    layers: tuple[Index, ...] = Field(max_length=MAX_LAYERS)
    rank: Index
    predecessors: Annotated[int, Field(ge=0, le=64)] | None
    residual: bool = False
    position_embeddings: tuple[Literal["source", "target"], ...] = Field(
        (), validation_alias=AliasChoices("position_embeddings", "places")
    )
    sink: tuple[Index, ...] = Field(max_length=64)
    anchors: Anchors
    fit: dict[str, float | int | str | None]
    r2: dict[str, float]
    reconstruction_error: float | None = None
    composed: tuple[PlainName, ...] = Field((), max_length=64)
    versions: dict[PlainName, PlainName] = Field(max_length=16)
    certificate: dict[str, Any] | None = None
    quantization: Literal["int8"] | None = None
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
        if self.quantization:
            shapes |= {"encode_scale": (features,), "decode_scale": (outputs,)}
        tables = self.position_embedding_shapes
        return shapes | {f"position_embeddings.{side}": tables[side] for side in tables}

    @property
    def measured(self) -> Certificate | None:
        """The certificate, None where the map is not certified.

        Raises:
            ValueError: figures that no measurement gives; no file that was read has any.
        """
        return parse_certificate(self.certificate)

    @property
    def certificate_statement(self) -> bytes | None:
        """What the certificate's signature is about; None without a certificate."""
        return None if self.certificate is None else statement(self.certificate, self.payload)

    @property
    def standing(self) -> str:
        """The certified figures of the map alone in one line, with the margin of a server's default
        plan over its controls."""
        if (certificate := self.measured) is None:
            return "not certified"
        plan = with_tail(certificate, certificate.protocol.context, TAIL, BUDGET)
        margin = f", margin as served {plan.margin.mean:+.3f}" if plan.margin else ""
        return (
            f"certified: retention {certificate.retention.mean:.3f}, "
            f"facts {certificate.facts.mean:.2f} of native{margin}"
        )


def read_manifest(path: Path) -> WMatrixManifest:
    """A W-Matrix's manifest alone; links are followed. Raises WMatrixCorrupt."""
    with refusing(path):
        return parse_manifest(read_header(path.resolve()))


def read_digest(path: Path) -> tuple[WMatrixManifest, str]:
    """A W-Matrix's manifest and the sha256, in hex, of its file. Raises WMatrixCorrupt."""
    manifest, digest, _ = read_digests(path)
    return manifest, digest


def read_digests(path: Path) -> tuple[WMatrixManifest, str, str]:
    """A W-Matrix's manifest, the sha256, in hex, of its file, and its `tensors_digest`. Raises
    WMatrixCorrupt."""
    manifests: list[WMatrixManifest] = []
    by_begin: dict[int, Any] = defaultdict(hashlib.sha256)
    with refusing(path):
        file = read_file(
            path.resolve(),
            lambda header: manifests.append(parse_manifest(header)),
            keep=lambda name: False,
            visit=lambda entry, chunk: by_begin[entry.begin].update(chunk.data),
        )
    digests = {
        name: TensorDigest(entry.dtype, entry.shape, by_begin[entry.begin].hexdigest())
        for name, entry in file.header.tensors.items()
    }
    return manifests[0], file.digest, tensors_digest(digests)


class TensorDigest(NamedTuple):
    """A tensor's dtype, by torch's name, its shape, and the sha256, in hex, of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def tensors_digest(tensors: Mapping[str, TensorDigest]) -> str:
    """sha256, in hex, of a map's tensors: what a latent names its map by, whatever certificate and
    name the map has by now."""
    lines = sorted((current_name(name), *tensor) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def parse_manifest(header: Header) -> WMatrixManifest:
    """The manifest in a W-Matrix's header, which has exactly the tensors that it implies.

    Raises:
        FileRefused: no valid manifest, or other tensors.
    """
    manifest = parse_document(WMatrixManifest, header.metadata.get(METADATA_KEY, ""))
    source, target = manifest.source, manifest.target
    if not set(manifest.layers) <= set(range(len(source.layers))):
        raise FileRefused(f"source layers {manifest.layers}"[:200], f"below {len(source.layers)}")
    if len(set(manifest.layers)) < len(manifest.layers):
        raise FileRefused(f"source layers {manifest.layers}"[:200], "each layer once")
    if manifest.residual and manifest.source_width != target.width:
        found = f"a residual map of {manifest.source_width} states"
        raise FileRefused(found, f"{target.width}")
    if not (manifest.layers and manifest.rank and manifest.sink):
        raise FileRefused("a map without source layers, rank or sink")
    if outside := [id for id in manifest.sink if id >= target.vocab_size]:
        raise FileRefused(f"a sink with ids {outside[:4]}", f"ids below {target.vocab_size}")
    entries = {current_name(name): entry for name, entry in header.tensors.items()}
    if len(entries) != len(manifest.tensor_shapes):
        found = f"{len(entries)} tensors"
        raise FileRefused(found, f"{len(manifest.tensor_shapes)}, the shapes of its geometries")
    shapes = {name: entry.shape for name, entry in entries.items()}
    if wrong := sorted(set(shapes.items()) ^ set(manifest.tensor_shapes.items())):
        raise FileRefused(f"tensors {wrong[:4]}"[:300], "the shapes of its geometries")
    products = (manifest.quantization,) if manifest.quantization else PRODUCT_DTYPES
    for name, entry in entries.items():
        dtypes = products if name in PRODUCTS else ("float32",)
        if entry.dtype not in dtypes:
            raise FileRefused(f"{name} of {entry.dtype}", " or ".join(dtypes))
    if entries["encode"].dtype != entries["decode"].dtype:
        raise FileRefused("encode and decode of two dtypes", "one dtype")
    try:
        parse_certificate(manifest.certificate)
    except ValueError as error:
        raise FileRefused(f"a certificate that nobody measured ({error})") from error
    return manifest


def current_name(tensor: str) -> str:
    """A tensor's name today: version 0.1 named the position embeddings `places`."""
    return re.sub(r"^places\.", "position_embeddings.", tensor)


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns FileRefused into WMatrixCorrupt."""
    try:
        yield
    except FileRefused as error:
        raise WMatrixCorrupt(
            f"W-Matrix {escaped(path.name)} cannot be used",
            found=error.found,
            expected=error.expected or "a W-Matrix as `awareness fit` writes it",
            remedy="fit it again, or restore the file from where it came",
        ) from error
