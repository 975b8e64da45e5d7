"""Memory package v1: one safetensors file, named by the sha256 of its bytes.

Its tensors are `tokens` [T] int32, `spans` [T, 2] int64, `text` [B] uint8 (UTF-8), and for each
layer i `layers.i.key` and `layers.i.value` [T, H, D] in the model's dtype, keys as cached
(positions applied); it has no others. A latent package has a map's latent instead of the states
(`packages.latent`); whoever needs the states refuses it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.files import put_in_place, scratch_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import Spans
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.packages.manifest import (
    METADATA_KEY,
    Manifest,
    corrupt_package,
    id_of,
    parse_manifest,
    refusing,
    tensor_name,
)
from awareness_vllm.packages.origin import seal
from awareness_vllm.tensor_file import (
    Bytes,
    FileRefused,
    TensorEntry,
    TensorFile,
    digest_of,
    is_whole,
    read_file,
)

INDEX = ("tokens", "spans", "text")
"""The tensors of a package that are not states."""


@dataclass(frozen=True)
class PackageIndex:
    """A package without its states; `digest` is the sha256, in hex, of its file. `spans` [T, 2] are
    the tokens' bytes in the text."""

    manifest: Manifest
    digest: str
    text: str
    tokens: list[int]
    spans: Spans


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


AnyPackage = Package | LatentPackage
P = TypeVar("P", Package, LatentPackage)


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
    hashed: bool = True,
    edition_of: str | None = None,
) -> Package:
    """A package of captured states; the geometry's dtype becomes that of the states, which a server
    may have been told to compute in another one.

    Args:
        hashed: whether the payload's digest is computed, which a package that becomes no file does
            not need.
    """
    geometry = geometry.model_copy(update={"dtype": str(keys[0].dtype).removeprefix("torch.")})
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
        edition_of=edition_of,
    )
    package = Package(manifest, text, tokens, spans, keys, values)
    return with_payload(package) if hashed else package


def with_payload(package: P) -> P:
    """A package with the payload's digest in its manifest."""
    manifest, tensors = package.manifest, sorted(_tensors(package).items())
    payload = payload_digest(manifest.model_dump_json(), tensors)
    return replace(package, manifest=manifest.model_copy(update={"payload": payload}))


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
    origin = package.manifest.model_dump(
        include={"engine", "versions", "name", "has_text", "edition_of"}
    )
    return build(**{"geometry": package.geometry, **captured, **origin, **changes})


def is_boundary(raw: bytes, end: int) -> bool:
    """Whether UTF-8 text ends between two characters after `end` bytes."""
    return end >= len(raw) or raw[end] & 0xC0 != 0x80


def publish(package: AnyPackage, store: Path, *, sealed: bool = True) -> Path:
    """Write a package atomically into a store folder, under its ID; the file's path. A whole file
    of that ID that is there already stays.

    A seal tells memories that were captured under this home from a stranger's; states that no model
    has computed are not `sealed`. It comes first, so that a kill leaves no package of ours without
    it.
    """
    store.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(package)
    with scratch_folder(store) as scratch:
        draft = scratch / "package"
        save_file(tensors, draft, {METADATA_KEY: package.manifest.model_dump_json()})
        digest = digest_of(draft)
        path = store / f"{id_of(digest)}.safetensors"
        if sealed:
            seal(digest)
        if not is_whole(path, digest):
            put_in_place(draft, path)
    return path


def read(path: Path, *, digest: str | None = None, largest: float = math.inf) -> Package:
    """A whole package; later changes of the file do not reach it.

    Args:
        digest: the beginning, in hex, that the file's sha256 must have.
        largest: magnitude that no state may exceed: what the cache's dtype can hold.

    Raises:
        PackageCorrupt: unreadable, another file, tensors that contradict the manifest, or states
            that are not finite.
        UnsupportedRequest: a latent package, which has no states of the source.
    """
    return with_states(_read(path, digest, largest)[1])


def with_states(package: AnyPackage) -> Package:
    """The package itself. Raises UnsupportedRequest for a latent one."""
    package.manifest.check_states()
    assert isinstance(package, Package)
    return package


def read_ahead(path: Path, digest: str, largest: float) -> tuple[AnyPackage, Callable[[], None]]:
    """A whole package before its bytes are hashed, and the function that waits for that: whatever
    is made of the package must not be used before.

    Args and errors as of `read`; the function, too, raises PackageCorrupt.
    """
    file, package = _read(path, None, largest)

    def check() -> None:
        with refusing(path):
            file.check_digest(digest)

    return package, check


def read_index(path: Path, *, digest: str | None = None, largest: float = math.inf) -> PackageIndex:
    """A package without its states, which are hashed and checked, but not kept.

    Args and errors as of `read`.
    """
    with refusing(path):
        manifest, file = _read_file(path, digest, largest, keep=lambda name: name in INDEX)
        return PackageIndex(manifest, file.digest, *_index(manifest, file))


def verify(path: Path) -> AnyPackage:
    """A whole package, latent or not, its manifest and tensors checked against the payload digest.

    The file's name does not matter: `read` with a digest proves more, but needs one.

    Raises:
        PackageCorrupt: altered or truncated.
    """
    file, package = _read(path, None, math.inf)
    document = file.header.metadata[METADATA_KEY]
    payload = payload_digest(document, sorted(file.tensors().items()))
    if payload != package.manifest.payload:
        raise corrupt_package(path, f"payload {payload}", expected=package.manifest.payload)
    return package


def _read(path: Path, digest: str | None, largest: float) -> tuple[TensorFile, AnyPackage]:
    with refusing(path):
        manifest, file = _read_file(path, digest, largest, keep=lambda name: True)
        text, tokens, spans = _index(manifest, file)
    if manifest.latent is not None:
        stored = {name: file.tensor(name) for name in file.buffers if name not in INDEX}
        return file, LatentPackage(manifest, text, tokens, spans, stored)
    keys, values = (
        [file.tensor(tensor_name(i, part)) for i in range(len(manifest.geometry.layers))]
        for part in ("key", "value")
    )
    return file, Package(manifest, text, tokens, spans, keys, values)


def _read_file(
    path: Path, digest: str | None, largest: float, keep: Callable[[str], bool]
) -> tuple[Manifest, TensorFile]:
    """A package's file, its states finite. Raises FileRefused."""
    manifests: list[Manifest] = []
    file = read_file(
        path,
        lambda header: manifests.append(parse_manifest(header)),
        digest=digest,
        keep=keep,
        visit=functools.partial(check_finite, largest=largest),
    )
    return manifests[0], file


def check_finite(entry: TensorEntry, chunk: Bytes, *, largest: float = math.inf) -> None:
    """Check a chunk of a floating-point tensor.

    An infinite or undefined value would reach other requests: attention multiplies what it masks
    by zero, and vLLM does not clear the blocks that it reuses.

    Raises:
        FileRefused: a value that is not finite, or whose magnitude exceeds `largest`.
    """
    dtype = getattr(torch, entry.dtype)
    if not dtype.is_floating_point or not len(chunk):
        return
    # Without its sign, a number's bits grow with its magnitude, and infinity and what is no number
    # come after all others. Maxima of integers take no threads, which would wait for each other.
    sign = 1 << (8 * dtype.itemsize - 1)
    positive = int(chunk.view(f"i{dtype.itemsize}").max())
    negative = int(chunk.view(f"u{dtype.itemsize}").max()) - sign
    if max(positive, negative) <= _bits(min(largest, torch.finfo(dtype).max), dtype):
        return
    values = torch.from_numpy(chunk).view(dtype).float().abs()
    if not values.isfinite().all():
        raise FileRefused("values that are not finite numbers", "finite numbers")
    raise FileRefused(f"a value of {float(values.max()):.3g}", f"at most {largest:g}")


@functools.cache
def _bits(value: float, dtype: torch.dtype) -> int:
    """The bits of a positive number, as an integer."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(torch.tensor(value, dtype=dtype).view(integer))


def read_states(path: Path) -> dict[str, Tensor]:
    """The captured states in a worker's file, by name. Raises PackageCorrupt."""
    with refusing(path):
        return read_file(path, lambda header: None, visit=check_finite).tensors()


def _index(manifest: Manifest, file: TensorFile) -> tuple[str, list[int], Spans]:
    """The text, its tokens and their spans, which must belong together. Raises FileRefused."""
    tokens, spans, raw = (file.tensor(name) for name in INDEX)
    try:
        text = raw.numpy().tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileRefused(f"text that is not UTF-8 ({error.reason})") from error
    vocabulary = manifest.reader.vocab_size if manifest.has_text else 1
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        found = f"ids from {int(tokens.min())} to {int(tokens.max())}"
        raise FileRefused(found, f"ids below {vocabulary}")
    begins, ends = spans.unbind(1)
    if bool(((begins < 0) | (begins > ends) | (ends > len(raw))).any()):
        raise FileRefused("spans outside of the text", f"spans within {len(raw)} bytes")
    ends = ends[ends > 0]  # special tokens span (0, 0)
    if bool((ends.diff() < 0).any()):
        raise FileRefused("spans out of order", "tokens in the order of the text")
    return text, tokens.tolist(), spans.numpy()


def _tensors(package: AnyPackage) -> dict[str, Tensor]:
    """The file's tensors by name."""
    text = package.text.encode()
    tensors = {
        "tokens": torch.tensor(package.tokens, dtype=torch.int32),
        "spans": torch.from_numpy(np.ascontiguousarray(package.spans)),
        "text": torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if text
        else torch.empty(0, dtype=torch.uint8),
    }
    if isinstance(package, LatentPackage):
        return tensors | package.stored
    for i, (key, value) in enumerate(zip(package.keys, package.values, strict=True)):
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
