"""The strict reader of safetensors files: packages, W-Matrices, disk-cache entries, captures.

A file is opened once, without following links. Its header is parsed and compared with what its
manifest implies before anything else is read; its bytes are hashed while they are copied into
memory. Nothing is read twice, and nothing maps a file that somebody else can shrink or change.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from awareness_vllm.errors import escaped

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 1 << 20
"""Bytes of a header: fifty times that of a package with 60 layers."""
MAX_ITEMS = 1 << 15
"""Commas of a JSON document: more members and elements take longer to check than they are worth."""
MAX_TENSORS = 1 << 12
MAX_METADATA = 16
"""Entries in a header's metadata: a reader looks one up, by its name."""
CHUNK = 1 << 20
"""Bytes that are read, hashed and checked at once, while a core's cache holds them."""
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
}
"""torch's name and the bytes of an element, by safetensors' names of the dtypes."""

T = TypeVar("T", bound=BaseModel)
Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, ...]
Layout = dict[str, tuple[str, Shape]]
"""The dtype, by torch's name, and the shape of each tensor, by name."""


class FileRefused(Exception):
    """A file that the strict reader refuses. Whoever knows what the file should be makes a typed
    error of it."""

    def __init__(self, found: str, expected: str | None = None) -> None:
        super().__init__(found if expected is None else f"{found}, expected {expected}")
        self.found, self.expected = found, expected


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a header; its bytes are begin … end-1 of those after the header."""

    dtype: str
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's header: the tensors in the order of their bytes, and the metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    raw: bytes

    @property
    def layout(self) -> Layout:
        return {name: (entry.dtype, entry.shape) for name, entry in self.tensors.items()}


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors in memory, whose bytes are hashed meanwhile."""

    header: Header
    hashed: Future[str]
    buffers: Mapping[str, Bytes]

    @property
    def digest(self) -> str:
        """sha256, in hex, of the whole file; waits for it."""
        return self.hashed.result()

    def check_digest(self, digest: str) -> None:
        """Raises FileRefused where the file's sha256 does not begin so."""
        if not self.digest.startswith(digest):
            raise FileRefused(f"sha256 {self.digest}", f"sha256 {digest}")

    def tensor(self, name: str) -> Tensor:
        """A tensor over the bytes in memory."""
        import torch

        entry = self.header.tensors[name]
        if not len(self.buffers[name]):
            return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        flat = torch.from_numpy(self.buffers[name]).view(getattr(torch, entry.dtype))
        return flat.view(entry.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are in memory, by name."""
        return {name: self.tensor(name) for name in self.buffers}


Check = Callable[[Header], None]
Visit = Callable[[TensorEntry, Bytes], None]
"""Sees each chunk of a tensor's bytes once they are in memory; the chunks hold whole elements."""


@contextlib.contextmanager
def opened(path: Path, *, limit: int | None = None) -> Iterator[tuple[FileIO, int]]:
    """A file and its size in bytes: a regular file of at most `limit` bytes, and no link.

    Raises:
        FileRefused: anything else, or unreadable.
    """
    try:
        # Opening a named pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        is_link = isinstance(error, OSError) and error.errno == errno.ELOOP
        reason = "a link" if is_link else str(error)
        raise FileRefused(f"not readable ({reason})", "a regular file") from error
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise FileRefused("not a regular file", "a regular file")
    with FileIO(descriptor) as file:
        if limit is not None and facts.st_size > limit:
            raise FileRefused(f"{facts.st_size} bytes", f"at most {limit}")
        yield file, facts.st_size


def read_header(path: Path) -> Header:
    """A file's header, which covers the file exactly; of the tensors nothing is read.

    Raises:
        FileRefused: not such a file.
    """
    with opened(path) as (file, size):
        return _header(file, size)


def read_file(
    path: Path,
    check: Check,
    *,
    digest: str | None = None,
    keep: Callable[[str], bool] = lambda name: True,
    visit: Visit = lambda entry, chunk: None,
) -> TensorFile:
    """A file in memory, hashed on the way there.

    Args:
        check: sees the header before any tensor is read, and raises what it finds wrong.
        digest: the beginning, in hex, that the file's sha256 must have.
        keep: whether a tensor, by name, stays in memory.
        visit: sees all tensors, also those that are not kept.

    Raises:
        FileRefused: not such a file, or one of another digest.
    """
    with opened(path) as (file, size):
        header = _header(file, size)
        check(header)
        buffers = {
            name: np.empty(entry.end - entry.begin, np.uint8)
            for name, entry in header.tensors.items()
            if keep(name)
        }
        with _Hash(header.raw) as sha:
            for entry, chunk in _chunks(header, buffers, sha):
                _fill(file, chunk)
                sha.update(chunk)
                visit(entry, chunk)
            read = TensorFile(header, sha.hexdigest(), buffers)
    if digest is not None:
        read.check_digest(digest)
    return read


class _Hash:
    """A sha256 of chunks, computed in a thread: it takes longer than reading and checking them."""

    def __init__(self, first: bytes) -> None:
        self.sha = hashlib.sha256(first)
        self.thread = ThreadPoolExecutor(1, "awareness-hash")
        self.last: Future[None] = self.thread.submit(lambda: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown(wait=False, cancel_futures=kind is not None)

    def update(self, chunk: Bytes) -> None:
        """Hash a chunk, soon: it must not change until the last update is done."""
        self.last = self.thread.submit(self.sha.update, chunk.data)

    def hexdigest(self) -> Future[str]:
        return self.thread.submit(self.sha.hexdigest)


def _chunks(
    header: Header, buffers: Mapping[str, Bytes], sha: _Hash
) -> Iterator[tuple[TensorEntry, Bytes]]:
    """The buffer of each chunk to read, in the file's order: a kept tensor's own, or else one of
    two that take turns, each once its last bytes are hashed."""
    scratch, used = [np.empty(0, np.uint8)] * 2, 0
    for name, entry in header.tensors.items():
        length = entry.end - entry.begin
        for begin in range(0, length, CHUNK):
            end = min(begin + CHUNK, length)
            if (kept := buffers.get(name)) is not None:
                yield entry, kept[begin:end]
                continue
            if not len(scratch[0]):
                scratch = [np.empty(CHUNK, np.uint8) for _ in range(2)]
            before, this = sha.last, scratch[used % 2][: end - begin]
            yield entry, this
            before.result()
            used += 1


def digest_of(path: Path) -> str:
    """sha256, in hex, of a whole file. Raises FileRefused."""
    with opened(path) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, digest: str) -> bool:
    """Whether a file is there and has this sha256, in hex."""
    try:
        return digest_of(path) == digest
    except FileRefused:
        return False


def parse_json(document: str | bytes) -> Any:
    """A JSON document's value: no key twice in an object, no NaN, no infinity.

    Raises:
        FileRefused: not such a document.
    """
    if document.count("," if isinstance(document, str) else b",") > MAX_ITEMS:  # type: ignore[arg-type]
        raise FileRefused("a JSON document of too many parts", f"at most {MAX_ITEMS}")
    try:
        return json.loads(document, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise FileRefused(f"no readable JSON ({str(error)[:100]})") from error


def parse_document(model: type[T], document: str | bytes, what: str = "manifest") -> T:
    """A JSON document as its model, each value of the exact type.

    Args:
        what: its name in the error.

    Raises:
        FileRefused: no such document; what it says is quoted in part only.
    """
    parse_json(document)
    try:
        return model.model_validate_json(document, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        complaint = escaped(f"{where}: {first['msg']}")[:200]
        raise FileRefused(f"no valid {what} ({complaint})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key twice in one object")
    return fields


def _constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name}")


def _header(file: FileIO, size: int) -> Header:
    """The header of a file of `size` bytes. Raises FileRefused."""
    length = int.from_bytes(_read(file, 8), "little")
    if length > MAX_HEADER or length > size - 8:
        raise FileRefused(f"a header of {length} bytes in a file of {size}")
    if length % 8:
        raise FileRefused(f"a header of {length} bytes", "a multiple of 8")
    raw = _read(file, length)
    document = parse_json(raw)
    if not isinstance(document, dict):
        raise FileRefused("a header that is no JSON object")
    metadata = document.pop("__metadata__", {})
    if len(document) > MAX_TENSORS:
        raise FileRefused(f"{len(document)} tensors", f"at most {MAX_TENSORS}")
    if not _is_metadata(metadata):
        raise FileRefused("metadata that are not a few texts by name")
    entries = {name: _entry(name, value) for name, value in document.items()}
    # safetensors stores empty tensors between others: they begin where their neighbour does.
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, entry in ordered.items():
        if entry.begin != end:
            raise FileRefused(f"{name[:80]!r} begins at byte {entry.begin}", f"{end}")
        end = entry.end
    if 8 + length + end != size:
        raise FileRefused(f"{size} bytes", f"{8 + length + end}, as the header says")
    return Header(ordered, metadata, length.to_bytes(8, "little") + raw)


def _is_metadata(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_METADATA
        and all(isinstance(text, str) for text in value.values())
    )


def _entry(name: str, value: object) -> TensorEntry:
    """A tensor of a header. Raises FileRefused."""
    what = f"tensor {name[:80]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileRefused(f"{what} without dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileRefused(f"{what} of dtype {dtype!r}"[:200], ", ".join(DTYPES))
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FileRefused(f"{what} whose shape or data_offsets are no lists of sizes")
    torch_name, itemsize = DTYPES[dtype]
    begin, end = offsets
    if end - begin != itemsize * math.prod(shape) or begin % itemsize:
        raise FileRefused(f"{what} of shape {tuple(shape)} at bytes {begin} to {end}"[:200])
    return TensorEntry(torch_name, tuple(shape), begin, end)


def _are_sizes(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(size) is int and 0 <= size < 1 << 50 for size in value)
    )


def _read(file: FileIO, count: int) -> bytes:
    buffer = np.empty(count, np.uint8)
    _fill(file, buffer)
    return buffer.tobytes()


def _fill(file: FileIO, buffer: Bytes) -> None:
    """Fill a buffer from a file. Raises FileRefused where the file ends before."""
    view, done = buffer.data, 0
    while done < len(view):
        try:
            count = file.readinto(view[done:])
        except OSError as error:
            raise FileRefused(f"not readable ({error})") from error
        if not count:
            raise FileRefused(f"the file ends {len(view) - done} bytes too early")
        done += count
