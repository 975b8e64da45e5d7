"""Mutations of the safetensors header and of a file's bytes."""

from __future__ import annotations

import json
from typing import Any

from fuzz.container import METADATA, assemble, encode
from fuzz.registry import ALWAYS, BYTES, HEADER, Rng, kind

Header = tuple[dict[str, Any], bytes]
"""The header's JSON, and the data."""


def tensors(header: dict[str, Any]) -> list[str]:
    return sorted(name for name in header if name != METADATA)


def some(rng: Rng, header: dict[str, Any]) -> dict[str, Any]:
    """The entry of a tensor that has bytes."""
    names = [n for n in tensors(header) if len(set(header[n]["data_offsets"])) == 2]
    return header[rng.choice(names)]


def joined(header: Any, data: bytes) -> bytes:
    return assemble(encode(header), data)


@kind(HEADER, refuse=ALWAYS)
def offsets_overlap(rng: Rng, file: Header) -> bytes:
    header, data = file
    one, other = some(rng, header), some(rng, header)
    begin = other["data_offsets"][0]
    size = one["data_offsets"][1] - one["data_offsets"][0]
    shift = rng.choice([0, 1, size])
    moved = [max(0, begin - shift), max(0, begin - shift) + size]
    unchanged = moved == one["data_offsets"]
    one["data_offsets"] = [moved[0] + 1, moved[1] + 1] if unchanged else moved
    return joined(header, data)


@kind(HEADER, refuse=ALWAYS)
def hole(rng: Rng, file: Header) -> bytes:
    """Bytes between two tensors, or before the first, that no tensor has."""
    header, data = file
    at, size = some(rng, header)["data_offsets"][0], rng.choice([1, 8, 4096])
    for name in tensors(header):
        begin, end = header[name]["data_offsets"]
        if begin >= at:
            header[name]["data_offsets"] = [begin + size, end + size]
    return joined(header, data[:at] + bytes(size) + data[at:])


@kind(HEADER, refuse=ALWAYS)
def offsets_strange(rng: Rng, file: Header) -> bytes:
    header, data = file
    entry = some(rng, header)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [[end, begin], [begin, end + 1], [begin, end - 1], [-1, end], [begin], [], None, "x",
         [begin, end, end], [str(begin), str(end)], [begin, 2**63], [2**64, 2**64 + 8],
         [begin + 10**9, end + 10**9], [begin + 0.5, end], [begin, 10**400], {"0": begin}]
    )  # fmt: skip
    return joined(header, data)


@kind(HEADER, refuse=ALWAYS)
def entry_strange(rng: Rng, file: Header) -> bytes:
    header, data = file
    name = rng.choice(tensors(header))
    key, value = rng.choice(
        [("dtype", "F128"), ("dtype", "BF17"), ("dtype", None), ("dtype", 7), ("dtype", "bf16"),
         ("dtype", "F4"), ("shape", None), ("shape", "x"), ("shape", [1.5]), ("shape", [None]),
         ("shape", [[1]]), ("shape", {}), ("shape", [True]), (None, None)]
    )  # fmt: skip
    if key is None:
        header[name] = rng.choice([None, 7, "x", [], {}])
    else:
        header[name][key] = value
    return joined(header, data)


@kind(HEADER, refuse=ALWAYS)
def metadata_strange(rng: Rng, file: Header) -> bytes:
    header, data = file
    old = header.get(METADATA, {})
    header[METADATA] = rng.choice(
        [None, 7, "x", [], {}, {"awareness": None}, {"awareness": 7}, {"awareness": {}},
         {**old, "x": 1}, {**old, "awareness": list(old.values())}]
    )  # fmt: skip
    return joined(header, data)


@kind(HEADER, refuse=ALWAYS)
def header_key_twice(rng: Rng, file: Header) -> bytes:
    header, data = file
    name = rng.choice(sorted(header))
    again = json.dumps(name) + ":" + json.dumps(header[name])
    raw = json.dumps(header)[1:-1]
    raw = rng.choice([f"{{{again}, {raw}}}", f"{{{raw}, {again}}}"])
    return assemble(raw.encode() + b" " * (-len(raw.encode()) % 8), data)


@kind(HEADER, refuse=ALWAYS)
def header_length_lies(rng: Rng, file: Header) -> bytes:
    header, data = file
    raw = encode(header)
    size = len(raw)
    lengths = [0, 1, size - 8, size + 8, size + 1, size + len(data), size + len(data) + 1, 2**31]
    return assemble(raw, data, rng.choice([*lengths, 2**40, 2**63 - 1, 2**63, 2**64 - 1]))


@kind(HEADER)
def header_unaligned(rng: Rng, file: Header) -> bytes:
    """Of a length that is no multiple of eight: tensors of words then begin between them."""
    header, data = file
    blanks = b" " * rng.randint(1, 7)
    raw = encode(header)
    return assemble(rng.choice([raw + blanks, blanks + raw]), data)


@kind(HEADER, refuse=ALWAYS)
def header_broken(rng: Rng, file: Header) -> bytes:
    header, data = file
    raw = encode(header)
    raw = rng.choice(
        [b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf" + raw, raw.replace(b'"', b"'", 2),
         raw[:-9], b"{" * 50_000, b"[" * 50_000, raw.rstrip()[:-1] + b"," + b"\xff\xfe" + b"}",
         raw.rstrip() + b"\x00" * 8, raw.decode("utf-8", "replace").encode("utf-16"),
         raw.rstrip()[:-1] + b', "deep": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"]
    )  # fmt: skip
    return assemble(raw, data)


@kind(HEADER)
def header_padded(rng: Rng, file: Header) -> bytes:
    """Megabytes of blanks: the reader may bound them, or read them in time."""
    header, data = file
    return assemble(encode(header) + b" " * rng.choice([8, 80_000, 8_000_000]), data)


@kind(BYTES, refuse=ALWAYS)
def trailing_bytes(rng: Rng, file: bytes) -> bytes:
    return file + bytes(rng.choice([1, 8, 4096, 5_000_000]))


@kind(BYTES, refuse=ALWAYS)
def truncated(rng: Rng, file: bytes) -> bytes:
    return file[: rng.choice([0, 1, 7, 8, 9, len(file) - 1, rng.randrange(len(file))])]


@kind(BYTES)
def bits_flipped(rng: Rng, file: bytes) -> bytes:
    raw = bytearray(file)
    for _ in range(rng.choice([1, 1, 3, 30])):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


@kind(BYTES)
def header_bits_flipped(rng: Rng, file: bytes) -> bytes:
    raw = bytearray(file)
    end = min(len(raw), 8 + int.from_bytes(raw[:8], "little"))
    for _ in range(rng.choice([1, 1, 2])):
        raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(raw)


@kind(BYTES)
def range_zeroed(rng: Rng, file: bytes) -> bytes:
    begin = rng.randrange(len(file))
    size = min(rng.choice([1, 16, 256, len(file)]), len(file) - begin)
    return file[:begin] + bytes(size) + file[begin + size :]


@kind(BYTES)
def range_moved(rng: Rng, file: bytes) -> bytes:
    begin, end, to = sorted(rng.randrange(len(file)) for _ in range(3))
    return file[:begin] + file[end:to] + file[begin:end] + file[to:]


@kind(BYTES, refuse=ALWAYS)
def random_bytes(rng: Rng, file: bytes) -> bytes:
    return rng.randbytes(rng.choice([1, 8, 100, 10_000]))


@kind(BYTES, refuse=ALWAYS)
def other_formats(rng: Rng, file: bytes) -> bytes:
    """A pickle, an archive, a git-lfs pointer, a page, a script."""
    return rng.choice(
        [b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04" + file, b"\x1f\x8b\x08" + file,
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<html>" + file,
         b"#!/bin/sh\n" + file, b"GGUF\x03\x00\x00\x00" + file, b"\x00" * 4096]
    )  # fmt: skip
