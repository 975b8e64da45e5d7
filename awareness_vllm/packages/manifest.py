"""The manifest of a memory package, and its ID; reading them needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from safetensors import SafetensorError, safe_open

from awareness_vllm.errors import (
    InvalidMemoryId,
    PackageCorrupt,
    UnsupportedModel,
    UnsupportedRequest,
)
from awareness_vllm.files import file_digest
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.schema import FrozenModel

METADATA_KEY = "awareness"
MEMORY_ID = re.compile(r"mem_[0-9a-f]{32}")


class Manifest(FrozenModel):
    """The JSON document in a package's safetensors metadata.

    `payload` is the sha256 over the other fields and the tensors; `engine` is the one that computed
    the states: a load into the same engine is exact. Without text (`has_text` false) the package
    has no token ids and no spans either: all of them are zero. `first_tokens` [layers] are the
    first tokens whose states each layer holds, empty unless a sliding window has lost some.
    """

    format: Literal["awareness-memory/1"] = "awareness-memory/1"
    name: str | None = None
    geometry: Geometry
    tokens: int
    has_text: bool = True
    engine: Literal["transformers", "vllm"]
    versions: dict[str, str]
    payload: str
    first_tokens: tuple[int, ...] = Field(
        (), validation_alias=AliasChoices("first_tokens", "begins")
    )

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k != "first_tokens" or v}

    def first_token(self, layer: int) -> int:
        """The index of the first token whose states a layer holds."""
        return self.first_tokens[layer] if self.first_tokens else 0

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


def id_of(path: Path) -> str:
    """The ID of a package file: `mem_` and half of the sha256 of its bytes."""
    try:
        return f"mem_{file_digest(path)[:32]}"
    except UnsupportedModel as error:
        raise corrupt_package(path, f"not readable ({error.found})") from error


def check_bytes(path: Path, memory_id: str) -> None:
    """Check that a file's bytes have this ID. Raises PackageCorrupt."""
    if (actual := id_of(path)) != memory_id:
        raise corrupt_package(path, f"its bytes are those of {actual}", expected=memory_id)


def read_manifest(path: Path) -> Manifest:
    """A package's manifest; of the tensors only the header is read.

    Raises:
        PackageCorrupt: not a safetensors file, no valid manifest, or tensors whose shapes
            contradict it.
    """
    try:
        with safe_open(path, framework="np") as file:
            document = manifest_document(file)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise corrupt_package(path, f"not a readable safetensors file ({error})") from error
    return parse_manifest(document, shapes, path)


def manifest_document(file: Any) -> str:
    """The manifest's JSON in an open safetensors file; empty where there is none."""
    return (file.metadata() or {}).get(METADATA_KEY, "")


def parse_manifest(document: str, shapes: Mapping[str, tuple[int, ...]], path: Path) -> Manifest:
    """The manifest of a package, checked against the `shapes` of its tensors by name.

    Raises:
        PackageCorrupt: no valid manifest, or one that a shape contradicts.
    """
    try:
        manifest = Manifest.model_validate_json(document)
    except ValidationError as error:
        raise corrupt_package(path, f"no valid manifest ({error})") from error
    layers, tokens, first = manifest.geometry.layers, manifest.tokens, manifest.first_tokens
    if len(first) not in (0, len(layers)):
        raise corrupt_package(path, f"first tokens of {len(first)} of {len(layers)} layers")
    expected: dict[str, tuple[int, ...]] = {"tokens": (tokens,), "spans": (tokens, 2)}
    for i, layer in enumerate(layers):
        shape: tuple[int, ...] = (tokens - manifest.first_token(i), layer.heads, layer.head_dim)
        expected |= {tensor_name(i, "key"): shape, tensor_name(i, "value"): shape}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise corrupt_package(
                path, f"{name} has shape {shapes.get(name)}", f"{shape}, by its manifest"
            )
    return manifest


def tensor_name(layer: int, part: str) -> str:
    """The name of a layer's states in a package; `part` is "key" or "value"."""
    return f"layers.{layer}.{part}"


def corrupt_package(
    path: Path, found: str, expected: str = "an unaltered memory package"
) -> PackageCorrupt:
    """The error about a package file that cannot be used."""
    return PackageCorrupt(
        f"memory package {path.name} cannot be used",
        found=found,
        expected=expected,
        remedy="capture the memory again, or restore the file from where it came",
    )
