"""Memory package v1: one safetensors file, named by the sha256 of its bytes.

Tensors: `tokens` [T] int32, `spans` [T, 2] int64, `text` [B] uint8 (UTF-8), and for each layer i
`layers.i.key` and `layers.i.value` [T, H, D] in the model's dtype, keys as cached (with positions).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.files import private_copy
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import Spans
from awareness_vllm.packages.manifest import (
    METADATA_KEY,
    Manifest,
    check_shapes,
    corrupt,
    document,
    id_of,
    parsed,
)


@dataclass(frozen=True)
class Package:
    """A memory package in memory. `keys[i]` and `values[i]` are layer i's states, [T, H, D]; of a
    layer whose window has lost the first tokens' states, those of the others."""

    manifest: Manifest
    text: str
    tokens: list[int]
    spans: Spans
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def geometry(self) -> Geometry:
        return self.manifest.geometry


def build(
    *,
    geometry: Geometry,
    text: str,
    tokens: list[int],
    spans: Spans,
    keys: list[Tensor],
    values: list[Tensor],
    engine: Literal["transformers", "vllm"],
    versions: dict[str, str],
    name: str | None = None,
    has_text: bool = True,
) -> Package:
    """A package from captured states; the manifest's payload digest is computed here."""
    tensors = _tensors(text, tokens, spans, keys, values)
    first_tokens = tuple(len(tokens) - len(key) for key in keys)
    manifest = Manifest(
        name=name,
        geometry=geometry,
        tokens=len(tokens),
        has_text=has_text,
        engine=engine,
        versions=versions,
        payload="",
        first_tokens=first_tokens if any(first_tokens) else (),
    )
    payload = payload_digest(manifest.model_dump_json(), sorted(tensors.items()))
    manifest = manifest.model_copy(update={"payload": payload})
    return Package(manifest, text, tokens, spans, keys, values)


def without_text(package: Package) -> Package:
    """The same states without text, token ids and spans.

    Nobody should take this for secrecy: prompts can be rebuilt from KV states.
    """
    count = package.manifest.tokens
    return build(
        geometry=package.geometry,
        text="",
        tokens=[0] * count,
        spans=np.zeros((count, 2), np.int64),
        keys=package.keys,
        values=package.values,
        engine=package.manifest.engine,
        versions=package.manifest.versions,
        name=package.manifest.name,
        has_text=False,
    )


def beginning(package: Package, tokens: int) -> Package:
    """The memory of a package's first `tokens` tokens, or of a few less where its text would end
    within a character: states of a prefix do not depend on what follows."""
    raw = package.text.encode()
    while tokens and not boundary(raw, end := int(package.spans[tokens - 1, 1])):
        tokens -= 1
    held = [tokens - len(package.tokens) + len(key) for key in package.keys]
    return build(
        geometry=package.geometry,
        text=raw[:end].decode() if tokens else "",
        tokens=package.tokens[:tokens],
        spans=package.spans[:tokens],
        keys=[key[: max(0, n)] for key, n in zip(package.keys, held, strict=True)],
        values=[value[: max(0, n)] for value, n in zip(package.values, held, strict=True)],
        engine=package.manifest.engine,
        versions=package.manifest.versions,
        name=package.manifest.name,
        has_text=package.manifest.has_text,
    )


def boundary(raw: bytes, end: int) -> bool:
    """Whether UTF-8 text can end there."""
    return end >= len(raw) or raw[end] & 0xC0 != 0x80


def publish(package: Package, store: Path) -> Path:
    """Write a package into a store folder under its ID, atomically: whole or not at all."""
    store.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(package.text, package.tokens, package.spans, package.keys, package.values)
    handle, temporary = tempfile.mkstemp(dir=store, prefix=".publish-")
    os.close(handle)
    try:
        save_file(tensors, temporary, {METADATA_KEY: package.manifest.model_dump_json()})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        path = store / f"{id_of(Path(temporary))}.safetensors"
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_text(path: Path) -> str:
    """A package's text alone. Raises PackageCorrupt."""
    try:
        return bytes(_read_tensor(path, "text").numpy()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise corrupt(path, f"text that is not UTF-8 ({error})") from error


def read_tokens(path: Path) -> list[int]:
    """A package's source token ids alone. Raises PackageCorrupt."""
    return _read_tensor(path, "tokens").tolist()


def read(path: Path) -> Package:
    """A whole package, in memory of its own: what becomes of the file later does not matter.

    Shapes are checked against the manifest's geometry; bytes are not re-hashed.

    Raises:
        PackageCorrupt: unreadable, or tensors that contradict the manifest.
    """
    try:
        with private_copy(path) as copy, safe_open(copy, framework="pt") as file:
            manifest = parsed(document(file), path)
            count = len(manifest.geometry.layers)
            keys = [file.get_tensor(f"layers.{i}.key") for i in range(count)]
            values = [file.get_tensor(f"layers.{i}.value") for i in range(count)]
            tokens = file.get_tensor("tokens")
            spans = file.get_tensor("spans")
            text = bytes(file.get_tensor("text").numpy()).decode("utf-8")
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise corrupt(path, f"not a readable package ({error})") from error
    tensors = {"tokens": tokens, "spans": spans}
    for part, states in (("key", keys), ("value", values)):
        tensors |= {f"layers.{i}.{part}": tensor for i, tensor in enumerate(states)}
    check_shapes(manifest, lambda name: tuple(tensors[name].shape), path)
    return Package(manifest, text, tokens.tolist(), spans.numpy(), keys, values)


def verify(path: Path) -> Package:
    """Read a package and prove that manifest and tensors are those it was built with.

    Whatever the file's name: `check_bytes` proves more, but needs the ID.

    Raises:
        PackageCorrupt: altered or truncated.
    """
    package = read(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            payload = payload_digest(document(file), tensors)
    except (SafetensorError, OSError) as error:
        raise corrupt(path, f"not a readable package ({error})") from error
    if payload != package.manifest.payload:
        raise corrupt(path, f"payload {payload}", expected=package.manifest.payload)
    return package


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise corrupt(path, f"no readable tensor {name!r} ({error})") from error


def _tensors(
    text: str, tokens: list[int], spans: Spans, keys: list[Tensor], values: list[Tensor]
) -> dict[str, Tensor]:
    tensors = {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "spans": torch.from_numpy(np.ascontiguousarray(spans)),
        "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        if text
        else torch.empty(0, dtype=torch.uint8),
    }
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        tensors[f"layers.{i}.key"] = key.contiguous()
        tensors[f"layers.{i}.value"] = value.contiguous()
    return tensors


def payload_digest(document: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over a manifest's JSON document, its own `payload` left out, and named tensors.

    The document, not the model parsed from it: a field that a later version adds with a default
    must not change the digest of the files of today.

    Args:
        tensors: sorted by name.
    """
    fields = json.loads(document) | {"payload": ""}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
