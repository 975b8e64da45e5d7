"""A layout's `index.json`, entry by entry: with 10⁵ artefacts it has 30 MB, and no reader needs all
of them as objects at once."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from awareness_vllm.errors import RegistryError
from awareness_vllm.oci.artefact import INDEX, REF_NAME
from awareness_vllm.oci.reference import DIGEST
from awareness_vllm.tensor_file import FileRefused, opened

MAX_LAYOUT = 64 << 20
"""Bytes of an index: those of 2 · 10⁵ artefacts."""
MAX_ENTRY = 64 << 10
"""Characters of one entry: a document as long as the index would take many times its memory."""
USUAL_ENTRY = 1 << 11
BLANK = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile("[\ud800-\udfff]")
Entry = dict[str, Any]
_DECODER = json.JSONDecoder()


def entries(path: Path, naming: str = "") -> Iterator[Entry]:
    """The entries of an index, in order: descriptors as they are in JSON. None where there is no
    such file.

    Args:
        naming: a tag, a digest or the beginning of one that the caller looks for. There are no
            entries where the whole file has none of it, which is known in a tenth of the time.

    Raises:
        RegistryError: no readable index, or more than MAX_LAYOUT.
    """
    try:
        text = _read(path)
        if _lacks(text, naming):
            return
        at = _past(text, 0, "{")
        while text[at] != "}":
            key, at = _decoded(text, at)
            at = _past(text, at, ":")
            if key == "manifests":
                at = yield from _items(text, at)
            else:
                _, at = _decoded(text, at)
            at = _past(text, at, ",", end="}")
    except (FileRefused, OSError, ValueError, IndexError, RecursionError) as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return
        raise RegistryError(
            f"{path.parent} cannot be used as a layout",
            found=str(error)[:200],
            expected="an index.json of the OCI image layout",
        ) from error


def written(manifests: list[Entry]) -> bytes:
    """The index of some entries. Raises RegistryError: nobody would read so large a one."""
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
    document = json.dumps(index, separators=(",", ":")).encode()
    if len(document) > MAX_LAYOUT:
        raise RegistryError(
            "the layout folder is full",
            found=f"an index.json of {len(document)} bytes, for {len(manifests)} tags",
            expected=f"{MAX_LAYOUT} at most",
            remedy="push to another folder, or to a registry",
        )
    return document


def tag_of(entry: Entry) -> str | None:
    """The tag that an entry names its manifest by."""
    notes = entry.get("annotations")
    tag = notes.get(REF_NAME) if isinstance(notes, dict) else None
    return tag if isinstance(tag, str) else None


def _read(path: Path) -> str:
    with opened(path, limit=MAX_LAYOUT) as (file, size), io.BufferedReader(file) as reader:
        return reader.read(size).decode()


def _lacks(text: str, name: str) -> bool:
    """Whether a document, which is whole by its ends, has no such name anywhere: one with escapes
    may have it in another form."""
    whole = text[:1] == "{" and text[-1:] == "}"
    return whole and name not in text and "\\" not in text


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """The value at a place, of at most MAX_ENTRY characters, and where it ends."""
    try:
        value, length = _DECODER.raw_decode(text[at : at + USUAL_ENTRY])
    except ValueError:
        value, length = _DECODER.raw_decode(text[at : at + MAX_ENTRY])
    return value, at + length


def _items(text: str, at: int) -> Generator[Entry, None, int]:
    """The objects of the array that begins at `at`; returns where it ends."""
    at = _past(text, at, "[")
    while text[at] != "]":
        item, at = _decoded(text, at)
        if not _is_descriptor(item):
            raise ValueError(f"the entry {item!r}"[:100])
        yield item
        at = _past(text, at, ",", end="]")
    return at + 1


def _is_descriptor(item: object) -> bool:
    """Whether the parts that a listing of tags needs are what they should be."""
    return (
        isinstance(item, dict)
        and isinstance(digest := item.get("digest"), str)
        and DIGEST.fullmatch(digest) is not None
        and type(size := item.get("size")) is int
        and 0 <= size < 1 << 50
        and _is_text(item.get("artifactType", ""))
        and _is_text(tag_of(item) or "")
    )


def _is_text(value: object) -> bool:
    """Whether a value is a text that can be written anywhere: one without lone surrogates."""
    return isinstance(value, str) and not SURROGATE.search(value)


def _past(text: str, at: int, mark: str, end: str = "") -> int:
    """The place after a mark and the blanks around it; that of `end` where this stands there."""
    at = _blanks(text, at)
    if end and text[at] == end:
        return at
    if text[at] != mark:
        raise ValueError(f"{text[at : at + 20]!r} at {at}, expected {mark!r}")
    return _blanks(text, at + 1)


def _blanks(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match is not None
    return match.end()
