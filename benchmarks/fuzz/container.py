"""A safetensors file in parts, written and read without any check: what mutations work on."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

METADATA, DOCUMENT = "__metadata__", "awareness"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Part:
    """One tensor as the file has it."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return cls(NAMES[tensor.dtype], list(tensor.shape), raw)

    @property
    def tensor(self) -> Tensor:
        """Raises ValueError, RuntimeError, KeyError, TypeError: no such dtype, or other bytes than
        the shape needs."""
        if not self.data:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        raw = torch.from_numpy(np.frombuffer(self.data, np.uint8).copy())
        return raw.view(DTYPES[self.dtype]).reshape(self.shape)


@dataclass
class Container:
    """A file's metadata, whose `DOCUMENT` is the manifest's JSON, and its tensors by name."""

    metadata: dict[str, Any]
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: bytes) -> Container:
        """The parts of a well-formed file; of a name that stands there twice, the last.

        Raises:
            ValueError, KeyError, TypeError: not well-formed.
        """
        length = int.from_bytes(raw[:8], "little")
        if length > len(raw) - 8:
            raise ValueError("the header ends behind the file")
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        metadata = header.pop(METADATA, {})
        parts = {}
        for name, one in header.items():
            begin, end = one["data_offsets"]
            parts[name] = Part(one["dtype"], list(one["shape"]), data[begin:end])
        return cls(metadata, parts)

    @property
    def document(self) -> Any:
        """The manifest. Raises ValueError: not JSON."""
        return json.loads(self.metadata[DOCUMENT])

    @document.setter
    def document(self, value: Any) -> None:
        self.metadata[DOCUMENT] = json.dumps(value)

    def sign(self) -> None:
        """Give the manifest the digest of its parts, where it can have one."""
        try:
            fields = self.document
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if isinstance(fields, dict) and "payload" in fields:
            digest = payload(fields, self.parts.items())
            # In the text: whatever else is strange about it stays.
            text = self.metadata[DOCUMENT]
            old = json.dumps(fields["payload"])
            self.metadata[DOCUMENT] = text.replace(old, f'"{digest}"', 1) if old != '""' else text

    def header(self) -> dict[str, Any]:
        """The header with the tensors one after another."""
        header: dict[str, Any] = {METADATA: self.metadata} if self.metadata else {}
        end = 0
        for name, part in self.parts.items():
            offsets = [end, end := end + len(part.data)]
            header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": offsets}
        return header

    def data(self) -> bytes:
        return b"".join(part.data for part in self.parts.values())


def payload(fields: dict[str, Any], parts: Iterable[tuple[str, Part]]) -> str:
    """The payload digest of a manifest's fields and its tensors, by the format's definition."""
    text = json.dumps(fields | {"payload": ""}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, part in sorted(parts):
        dtype = DTYPES.get(part.dtype, part.dtype)
        digest.update(f"\n{name} {dtype} {tuple(part.shape)}\n".encode())
        digest.update(part.data)
    return digest.hexdigest()


def assemble(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of a header, which says that it has `length` bytes, and data."""
    size = len(header) if length is None else length
    return struct.pack("<Q", size % 2**64) + header + data


def encode(header: Any) -> bytes:
    """A header's bytes, padded as safetensors pads them: data begin at a multiple of eight."""
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
    return raw + b" " * (-len(raw) % 8)
