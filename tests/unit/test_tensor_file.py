"""The strict reader: files that cover themselves exactly, hashed as they are copied."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from awareness_vllm.tensor_file import (
    MAX_HEADER,
    FileRefused,
    Header,
    opened,
    parse_json,
    read_file,
    read_header,
)

pytestmark = pytest.mark.unit

TENSORS = {
    "a": torch.arange(6, dtype=torch.int64).view(2, 3),
    "b": torch.linspace(-1, 1, 5).bfloat16(),
    "empty": torch.empty(0, dtype=torch.uint8),
    "c": torch.tensor([7, 8, 9], dtype=torch.uint8),
}
RAW = save(TENSORS, {"name": "value"})


def anything(header: Header) -> None:
    """No further demands."""


def written(folder: Path, raw: bytes) -> Path:
    path = folder / "file.safetensors"
    path.write_bytes(raw)
    return path


def parts_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header and what follows it."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def test_tensors_and_digest_of_one_read(tmp_path: Path) -> None:
    file = read_file(written(tmp_path, RAW), anything)
    assert file.digest == hashlib.sha256(RAW).hexdigest()
    assert dict(file.header.metadata) == {"name": "value"}
    for name, tensor in TENSORS.items():
        assert file.tensor(name).dtype == tensor.dtype
        assert torch.equal(file.tensor(name), tensor)


def test_what_is_not_kept_is_seen_and_hashed_all_the_same(tmp_path: Path) -> None:
    seen = []
    file = read_file(
        written(tmp_path, RAW),
        anything,
        keep=lambda name: name == "a",
        visit=lambda entry, chunk: seen.append(chunk.tobytes()),
    )
    assert list(file.buffers) == ["a"]
    assert file.digest == hashlib.sha256(RAW).hexdigest()
    assert b"".join(seen) == parts_of(RAW)[1]


def test_nothing_is_read_where_the_check_refuses(tmp_path: Path) -> None:
    def refuse(header: Header) -> None:
        raise FileRefused("no")

    def fail(*_: object) -> None:
        raise AssertionError("tensors were read")

    with pytest.raises(FileRefused, match="no"):
        read_file(written(tmp_path, RAW), refuse, visit=fail)


def test_another_digest_is_refused(tmp_path: Path) -> None:
    path, digest = written(tmp_path, RAW), hashlib.sha256(RAW).hexdigest()
    assert read_file(path, anything, digest=digest[:32]).digest == digest
    with pytest.raises(FileRefused, match=digest):
        read_file(path, anything, digest="0" * 32)


def test_a_file_that_changes_or_shrinks_later_leaves_the_copy_alone(tmp_path: Path) -> None:
    path = written(tmp_path, RAW)
    file = read_file(path, anything)
    with path.open("r+b") as other:
        other.write(b"\xff" * len(RAW))
        other.truncate(10)
    assert all(torch.equal(file.tensor(name), TENSORS[name]) for name in TENSORS)


HEADER, DATA = parts_of(RAW)


def changed(**entries: Any) -> dict[str, Any]:
    return {**HEADER, **entries}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        RAW[:7],
        RAW[:-1],
        RAW + b"\0",
        (1 << 63).to_bytes(8, "little") + RAW[8:],
        (MAX_HEADER + 8).to_bytes(8, "little") + b"{" + b" " * (MAX_HEADER + 8),
        len(b'{"a":1}').to_bytes(8, "little") + b'{"a":1}',
        joined([], DATA),
        joined(b"{", DATA),
        joined(b"[" * 100_000, b""),
        joined(b'{"a":' * 100_000, b""),
        joined(b'{"\xff": 1}', b""),
        joined(b'{"__metadata__": {"a": NaN}}', b""),
        joined(json.dumps(HEADER).encode()[:-1] + b', "a": {}}', DATA),
        joined(changed(__metadata__=[]), DATA),
        joined(changed(__metadata__={"a": 1}), DATA),
        joined(changed(__metadata__={str(i): "" for i in range(17)}), DATA),
        joined(changed(a={**HEADER["a"], "more": 1}), DATA),
        joined(changed(a={**HEADER["a"], "dtype": "F8_E4M3"}), DATA),
        joined(changed(a={**HEADER["a"], "dtype": ["I64"]}), DATA),
        joined(changed(a={**HEADER["a"], "dtype": "F64", "shape": [7]}), DATA),
        joined(changed(a={**HEADER["a"], "shape": [2, 4]}), DATA),
        joined(changed(a={**HEADER["a"], "shape": [-2, -3]}), DATA),
        joined(changed(a={**HEADER["a"], "shape": [2.0, 3]}), DATA),
        joined(changed(a={**HEADER["a"], "shape": [True, 6]}), DATA),
        joined(changed(a={**HEADER["a"], "shape": [1] * 9}), DATA),
        joined(changed(a={**HEADER["a"], "data_offsets": [8, 56]}), DATA),
        joined(changed(a={**HEADER["a"], "data_offsets": [0]}), DATA),
        joined(changed(a={**HEADER["a"], "data_offsets": [10**400, 10**400 + 48]}), DATA),
        joined(changed(d=HEADER["a"]), DATA),
        joined(
            {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(4097)},
            b"",
        ),
        joined({name: HEADER[name] for name in HEADER if name != "a"}, DATA),
        # One byte before the numbers of two: they would begin at an odd address.
        joined(
            {
                "c": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                "b": {"dtype": "BF16", "shape": [1], "data_offsets": [1, 3]},
            },
            b"\0\0\0",
        ),
    ],
)
def test_a_file_that_is_not_exactly_its_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    for read in (read_header, lambda path: read_file(path, anything)):
        with pytest.raises(FileRefused):
            read(written(tmp_path, raw))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(RAW)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = written(tmp_path_factory.getbasetemp(), bytes(raw))
    try:
        file = read_file(path, anything)
    except FileRefused:
        return
    assert file.digest == hashlib.sha256(raw).hexdigest()
    assert sum(len(buffer) for buffer in file.buffers.values()) == len(DATA)


def test_only_regular_files_are_opened_and_no_links(tmp_path: Path) -> None:
    target = written(tmp_path, RAW)
    link, pipe, folder = tmp_path / "link", tmp_path / "pipe", tmp_path / "folder"
    link.symlink_to(target)
    os.mkfifo(pipe)  # nobody writes to it: opening it the usual way would wait for ever
    folder.mkdir()
    missing, broken = tmp_path / "missing", tmp_path / "broken"
    broken.symlink_to(missing)
    for path in (link, pipe, folder, missing, broken, Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(FileRefused), opened(path):
            pass
    with pytest.raises(FileRefused, match="at most 8"), opened(target, limit=8):
        pass
    with opened(target) as (file, size):
        assert (file.read(8), size) == (RAW[:8], len(RAW))


@pytest.mark.parametrize(
    "document",
    [
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "a": 2}}',
        "NaN",
        "-Infinity",
        "[",
        "1" * 5000,
        f"[{'0,' * 40_000}0]",
    ],
)
def test_ambiguous_json_is_refused(document: str) -> None:
    with pytest.raises(FileRefused):
        parse_json(document)
