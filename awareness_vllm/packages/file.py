"""Memory package v1: one safetensors file, named by the sha256 of its bytes.

Tensors: `tokens` [T] int32, `spans` [T, 2] int64, `text` [B] uint8 (UTF-8), and for each layer i
`layers.i.key` and `layers.i.value` [T, H, D] in the model's dtype, keys as cached (positions
applied).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.files import draft_file, private_copy
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import Spans
from awareness_vllm.packages.manifest import (
    METADATA_KEY,
    Manifest,
    corrupt_package,
    id_of,
    manifest_document,
    parse_manifest,
    tensor_name,
)


@dataclass(frozen=True)
class Package:
    """A memory package in memory. `keys[i]` and `values[i]` are layer i's states, [T, H, D]; fewer
    rows where a sliding window has lost the first tokens' states."""

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
    """A package of captured states, its payload digest computed."""
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
    """A package with the same states, without text, token ids and spans.

    This is no secrecy: prompts can be rebuilt from KV states.
    """
    spans = np.zeros((package.manifest.tokens, 2), np.int64)
    return _rebuild(package, text="", tokens=[0] * len(spans), spans=spans, has_text=False)


def beginning(package: Package, tokens: int) -> Package:
    """The package of a package's first `tokens` tokens, or of a few fewer where its text would end
    within a character: the states of a prefix do not depend on what follows."""
    raw = package.text.encode()
    while tokens and not is_boundary(raw, end := int(package.spans[tokens - 1, 1])):
        tokens -= 1
    counts = [tokens - len(package.tokens) + len(key) for key in package.keys]
    return _rebuild(
        package,
        text=raw[:end].decode() if tokens else "",
        tokens=package.tokens[:tokens],
        spans=package.spans[:tokens],
        keys=[key[: max(0, n)] for key, n in zip(package.keys, counts, strict=True)],
        values=[value[: max(0, n)] for value, n in zip(package.values, counts, strict=True)],
    )


def _rebuild(package: Package, **changes: Any) -> Package:
    """A package with other arguments of `build`."""
    captured = {
        name: getattr(package, name) for name in ("text", "tokens", "spans", "keys", "values")
    }
    origin = package.manifest.model_dump(include={"engine", "versions", "name", "has_text"})
    return build(**{"geometry": package.geometry, **captured, **origin, **changes})


def is_boundary(raw: bytes, end: int) -> bool:
    """Whether UTF-8 text ends between two characters after `end` bytes."""
    return end >= len(raw) or raw[end] & 0xC0 != 0x80


def publish(package: Package, store: Path) -> Path:
    """Write a package atomically into a store folder, under its ID; the file's path."""
    store.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(package.text, package.tokens, package.spans, package.keys, package.values)
    with draft_file(store) as draft:
        save_file(tensors, draft, {METADATA_KEY: package.manifest.model_dump_json()})
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.chmod(0o644)
        path = store / f"{id_of(draft)}.safetensors"
        os.replace(draft, path)
    return path


def read_text(path: Path) -> str:
    """A package's text alone. Raises PackageCorrupt."""
    try:
        return bytes(_read_tensor(path, "text").numpy()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise corrupt_package(path, f"text that is not UTF-8 ({error})") from error


def read_tokens(path: Path) -> list[int]:
    """A package's source token ids alone. Raises PackageCorrupt."""
    return _read_tensor(path, "tokens").tolist()


def read(path: Path) -> Package:
    """A whole package; later changes of the file do not reach it.

    Shapes are checked against the manifest's geometry; bytes are not hashed again.

    Raises:
        PackageCorrupt: unreadable, or tensors that contradict the manifest.
    """
    return _read(path)[0]


def verify(path: Path) -> Package:
    """A whole package, its manifest and tensors checked against the payload digest.

    The file's name does not matter: `check_bytes` proves more, but needs the ID.

    Raises:
        PackageCorrupt: altered or truncated.
    """
    package, document, tensors = _read(path)
    payload = payload_digest(document, sorted(tensors.items()))
    if payload != package.manifest.payload:
        raise corrupt_package(path, f"payload {payload}", expected=package.manifest.payload)
    return package


def _read(path: Path) -> tuple[Package, str, dict[str, Tensor]]:
    """A package, and what its file holds: the manifest's JSON, the tensors by name."""
    try:
        with private_copy(path) as copy, safe_open(copy, framework="pt") as file:
            document = manifest_document(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        manifest = parse_manifest(document, {n: tuple(t.shape) for n, t in tensors.items()}, path)
        text = bytes(tensors["text"].numpy()).decode("utf-8")
    except (SafetensorError, OSError, KeyError, UnicodeDecodeError) as error:
        raise corrupt_package(path, f"not a readable package ({error})") from error
    keys, values = (
        [tensors[tensor_name(i, part)] for i in range(len(manifest.geometry.layers))]
        for part in ("key", "value")
    )
    tokens, spans = tensors["tokens"].tolist(), tensors["spans"].numpy()
    return Package(manifest, text, tokens, spans, keys, values), document, tensors


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise corrupt_package(path, f"no readable tensor {name!r} ({error})") from error


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
        tensors[tensor_name(i, "key")] = key.contiguous()
        tensors[tensor_name(i, "value")] = value.contiguous()
    return tensors


def payload_digest(document: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256, in hex, of a manifest's JSON without its `payload`, and of named tensors.

    Of the JSON, not of the model parsed from it: a field that a later version adds with a default
    must not change the digest of today's files.

    Args:
        tensors: sorted by name.
    """
    fields = json.loads(document) | {"payload": ""}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
