"""What a memory package says about itself, and its ID; reading them needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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

    `payload` is the sha256 over the other fields and the tensors; `engine` tells whose numerics
    the states have, so whether a load into the same server is exact. Without text (`has_text`)
    the package has no token ids and no spans either: all of them are zero. `first_tokens` says
    of each layer which token is the first whose states it holds, where a window has lost some,
    else nothing.
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
        """The first token whose states a layer holds."""
        return self.first_tokens[layer] if self.first_tokens else 0

    def check_whole(self, layers: Iterable[int]) -> None:
        """Prove that these layers hold the states of all tokens.

        Raises:
            UnsupportedRequest: a window has lost some.
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
    """The ID if it is well-formed.

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
    """The ID that a package file's bytes have: `mem_` and half of their sha256."""
    try:
        return f"mem_{file_digest(path)[:32]}"
    except UnsupportedModel as error:
        raise corrupt(path, f"not readable ({error.found})") from error


def check_bytes(path: Path, memory_id: str) -> None:
    """Prove that a file's bytes are those that the ID names. Raises PackageCorrupt."""
    if (found := id_of(path)) != memory_id:
        raise corrupt(path, f"its bytes are those of {found}", expected=memory_id)


def read_manifest(path: Path) -> Manifest:
    """A package's manifest alone.

    Raises:
        PackageCorrupt: not a safetensors file, or no valid manifest in it.
    """
    try:
        with safe_open(path, framework="np") as file:
            return parsed(document(file), path)
    except (SafetensorError, OSError) as error:
        raise corrupt(path, f"not a readable safetensors file ({error})") from error


def checked_manifest(path: Path) -> Manifest:
    """A package's manifest, if by its header the tensors have the shapes that its geometry says.

    Raises:
        PackageCorrupt
    """
    try:
        with safe_open(path, framework="np") as file:
            manifest = parsed(document(file), path)
            check_shapes(manifest, lambda name: tuple(file.get_slice(name).get_shape()), path)
            return manifest
    except (SafetensorError, OSError) as error:
        raise corrupt(path, f"not a readable safetensors file ({error})") from error


def document(file: Any) -> str:
    """The manifest's JSON in an open safetensors file; nothing where there is none."""
    return (file.metadata() or {}).get(METADATA_KEY, "")


def parsed(text: str, path: Path) -> Manifest:
    """Raises PackageCorrupt."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise corrupt(path, f"no valid manifest ({error})") from error


def check_shapes(
    manifest: Manifest, shape_of: Callable[[str], tuple[int, ...]], path: Path
) -> None:
    """Raises PackageCorrupt where a tensor is not what the manifest says."""
    layers, tokens = manifest.geometry.layers, manifest.tokens
    if len(manifest.first_tokens) not in (0, len(layers)):
        raise corrupt(path, f"first tokens of {len(manifest.first_tokens)} of {len(layers)} layers")
    wanted: dict[str, tuple[int, ...]] = {"tokens": (tokens,), "spans": (tokens, 2)}
    for i, layer in enumerate(layers):
        shape: tuple[int, ...] = (tokens - manifest.first_token(i), layer.heads, layer.head_dim)
        wanted[f"layers.{i}.key"] = wanted[f"layers.{i}.value"] = shape
    for name, shape in wanted.items():
        if (found := shape_of(name)) != shape:
            raise corrupt(path, f"{name} has shape {found}", expected=f"{shape}, by its manifest")


def corrupt(
    path: Path, found: str, expected: str = "an unaltered memory package"
) -> PackageCorrupt:
    return PackageCorrupt(
        f"memory package {path.name} cannot be used",
        found=found,
        expected=expected,
        remedy="capture the memory again, or restore the file from where it came",
    )
