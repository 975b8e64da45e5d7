"""The manifest of a memory package, and its ID; reading them needs no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from awareness_vllm.errors import InvalidMemoryId, PackageCorrupt, UnsupportedRequest
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.schema import FrozenModel, PlainName
from awareness_vllm.tensor_file import (
    FileRefused,
    Header,
    Layout,
    digest_of,
    parse_document,
    read_header,
)
from awareness_vllm.trust.policy import TrustPolicy

METADATA_KEY = "awareness"
STATE_DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of states, by torch's names."""
MAX_TOKEN_BYTES = 512
"""Bytes of text that a token can stand for: vocabularies have runs of blanks of some 128."""
MEMORY_ID = re.compile(r"mem_[0-9a-f]{32}")
LATENT_FORMAT = "awareness-latent/1"


class StoredLatent(FrozenModel):
    """What a latent package holds instead of the source's states: one row for each of the target's
    tokens of the text, as a map encodes them.

    `package` is the memory that it was made of; `wmatrix` is the digest of the map's tensors, which
    a new certificate leaves as it is (`wmatrix.manifest.read_digests`); `target` the map's target,
    which reads the text in `tokens`. The rows [tokens, rank] are of `dtype`; int8 has scales.
    """

    package: str = Field(pattern=f"^{MEMORY_ID.pattern}$", max_length=36)
    wmatrix: str = Field(pattern="^[0-9a-f]{64}$", max_length=64)
    target: Geometry
    tokens: int = Field(ge=1, le=1 << 31)
    rank: int = Field(ge=1, le=1 << 20)
    dtype: Literal["bfloat16", "float16", "float32", "int8"]


class Manifest(FrozenModel):
    """The JSON document in a package's safetensors metadata.

    `payload` is the sha256 over the other fields and the tensors; `engine` is the one that computed
    the states: a load into the same engine is exact. Without text (`has_text` false) the package
    has no token ids and no spans either: all of them are zero. `first_tokens` [layers] are the
    first tokens whose states each layer holds, empty unless a sliding window has lost some.
    `edition_of` is the memory whose text this one's model has read. `geometry` and `tokens` are the
    source's, also where the file holds a `latent`.
    """

    format: Literal["awareness-memory/1", "awareness-latent/1"] = "awareness-memory/1"
    name: PlainName | None = None
    geometry: Geometry
    tokens: int = Field(ge=0, le=1 << 31)
    has_text: bool = True
    engine: Literal["transformers", "vllm"]
    versions: dict[PlainName, PlainName] = Field(max_length=16)
    payload: str = Field(max_length=64)
    first_tokens: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), validation_alias=AliasChoices("first_tokens", "begins")
    )
    edition_of: str | None = Field(None, pattern=f"^{MEMORY_ID.pattern}$", max_length=36)
    latent: StoredLatent | None = None

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if (self.latent is not None) != (self.format == LATENT_FORMAT):
            raise ValueError(f"a latent, and only that, is of format {LATENT_FORMAT}")
        if self.latent is not None and (self.first_tokens or not self.has_text):
            raise ValueError("a latent of a package without text, or with states lost")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what most packages do not have: their files stay as they were."""
        rare = ("first_tokens", "edition_of", "latent")
        return {k: v for k, v in handler(self).items() if k not in rare or v}

    @property
    def reader(self) -> Geometry:
        """The model whose tokens of the text the file has: the source, or a latent's target."""
        return self.geometry if self.latent is None else self.latent.target

    @property
    def rows(self) -> int:
        """The number of those tokens."""
        return self.tokens if self.latent is None else self.latent.tokens

    @property
    def rounded(self) -> bool:
        """Whether the file holds a latent in int8."""
        return self.latent is not None and self.latent.dtype == "int8"

    def first_token(self, layer: int) -> int:
        """The index of the first token whose states a layer holds."""
        return self.first_tokens[layer] if self.first_tokens else 0

    def check_states(self) -> None:
        """Check that the package holds the source's states.

        Raises:
            UnsupportedRequest: it is a latent one.
        """
        if self.latent is not None:
            raise UnsupportedRequest(
                "a latent package has no states of its source",
                found=f"the latent of a map to {self.latent.target.name}",
                expected="the source's states",
                remedy=f"use the package that it was made of, {self.latent.package}",
            )

    def check_whole(self, layers: Iterable[int]) -> None:
        """Check that these layers hold the states of all tokens.

        Raises:
            UnsupportedRequest: a sliding window has lost some.
        """
        if lost := [layer for layer in layers if self.first_token(layer)]:
            raise UnsupportedRequest(
                "a sliding window has lost states of the memory",
                found=f"layers {lost} begin at tokens {[self.first_token(i) for i in lost]}",
                expected="all tokens in every layer that is read",
                remedy="capture it with `awareness capture`, or fit a map that reads the layers "
                "without a window (`awareness fit --choice full`)",
            )


def check_id(memory_id: object) -> str:
    """The ID itself, where it is well-formed.

    Raises:
        InvalidMemoryId: anything else, paths included.
    """
    if isinstance(memory_id, str) and MEMORY_ID.fullmatch(memory_id):
        return memory_id
    raise InvalidMemoryId(
        "malformed memory ID",
        found=repr(memory_id)[:80],
        expected="'mem_' and 32 hexadecimal digits",
        remedy="use an ID printed by `awareness capture` or `awareness list`",
    )


def id_of(digest: str) -> str:
    """The ID of a package whose file has this sha256: `mem_` and its first half."""
    return f"mem_{digest[:32]}"


def signer_of(path: Path, trust: TrustPolicy) -> str | None:
    """The name of the trusted key that signed a package, whose whole file is hashed; None for an
    unsigned one.

    Raises:
        PackageCorrupt: not readable, or bytes that do not have the ID that the file is named by.
        SignatureInvalid
    """
    with refusing(path):
        digest = digest_of(path)
    if MEMORY_ID.fullmatch(path.stem) and id_of(digest) != path.stem:
        raise corrupt_package(path, f"its bytes are those of {id_of(digest)}", path.stem)
    return trust.signer(path, digest, "package")


def read_manifest(path: Path) -> Manifest:
    """A package's manifest; of the tensors only the header is read.

    Raises:
        PackageCorrupt: not a safetensors file, no valid manifest, or tensors that contradict it.
    """
    with refusing(path):
        return parse_manifest(read_header(path))


def parse_manifest(header: Header) -> Manifest:
    """The manifest in a package's header, which has exactly the tensors that it implies.

    Raises:
        FileRefused: no valid manifest, or other tensors.
    """
    manifest = parse_document(Manifest, header.metadata.get(METADATA_KEY, ""))
    layers, first, dtype = manifest.geometry.layers, manifest.first_tokens, manifest.geometry.dtype
    if len(first) not in (0, len(layers)):
        raise FileRefused(f"first tokens of {len(first)} of {len(layers)} layers")
    if dtype not in STATE_DTYPES:
        raise FileRefused(f"states of {dtype}", " or ".join(STATE_DTYPES))
    layout = header.layout
    _, text = layout.get("text", ("", ()))
    expected = layout_of(manifest, text[0] if len(text) == 1 else 0)
    if len(layout) != len(expected):
        raise FileRefused(f"{len(layout)} tensors", f"{len(expected)}, by its manifest")
    if different := sorted(set(layout.items()) ^ set(expected.items())):
        name = different[0][0]
        raise FileRefused(
            f"tensor {name[:80]!r}: {layout.get(name, 'none')}",
            f"{expected.get(name, 'none')}, by its manifest",
        )
    check_text_length(manifest, text[0])
    return manifest


def layout_of(manifest: Manifest, text: int) -> Layout:
    """The tensors of a package with so many bytes of text."""
    tokens = manifest.rows
    layout: Layout = {
        "tokens": ("int32", (tokens,)),
        "spans": ("int64", (tokens, 2)),
        "text": ("uint8", (text,)),
    }
    if (latent := manifest.latent) is not None:
        layout["latent"] = (latent.dtype, (tokens, latent.rank))
        if latent.dtype == "int8":
            layout["latent_scale"] = ("float32", (latent.rank,))
        return layout
    for i, layer in enumerate(manifest.geometry.layers):
        shape = (tokens - manifest.first_token(i), layer.heads, layer.head_dim)
        for part in ("key", "value"):
            layout[tensor_name(i, part)] = (manifest.geometry.dtype, shape)
    return layout


def check_text_length(manifest: Manifest, text: int) -> None:
    """Raises FileRefused where a text of so many bytes cannot be the one of the tokens: reading it
    would take work that the states do not account for."""
    limit = MAX_TOKEN_BYTES * manifest.rows if manifest.has_text else 0
    if text > limit:
        raise FileRefused(f"{text} bytes of text for {manifest.rows} tokens", f"at most {limit}")


def tensor_name(layer: int, part: str) -> str:
    """The name of a layer's states in a package; `part` is "key" or "value"."""
    return f"layers.{layer}.{part}"


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns FileRefused into PackageCorrupt."""
    try:
        yield
    except FileRefused as error:
        raise corrupt_package(path, error.found, error.expected) from error


def corrupt_package(path: Path, found: str, expected: str | None = None) -> PackageCorrupt:
    """The error about a package file that cannot be used."""
    return PackageCorrupt(
        f"memory package {path.name} cannot be used",
        found=found,
        expected=expected or "an unaltered memory package",
        remedy="capture the memory again, or restore the file from where it came",
    )
