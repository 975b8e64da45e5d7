"""A layout's `index.json`, entry by entry: with 10⁵ artefacts it has 30 MB, and no reader needs all
of them as objects at once."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from awareness_vllm.errors import RegistryError
from awareness_vllm.oci.artefact import REF_NAME
from awareness_vllm.oci.reference import DIGEST

BLANK = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile("[\ud800-\udfff]")
Entry = dict[str, Any]
_DECODER = json.JSONDecoder()


def entries(path: Path) -> Iterator[Entry]:
    """The entries of an index, in order: descriptors as they are in JSON. None where there is no
    such file.

    Raises:
        RegistryError: no readable index.
    """
    try:
        text = path.read_bytes().decode()
        at = _past(text, 0, "{")
        while text[at] != "}":
            key, at = _DECODER.raw_decode(text, at)
            at = _past(text, at, ":")
            if key == "manifests":
                at = yield from _items(text, at)
            else:
                _, at = _DECODER.raw_decode(text, at)
            at = _past(text, at, ",", end="}")
    except FileNotFoundError:
        return
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise RegistryError(
            f"{path.parent} cannot be used as a layout",
            found=str(error)[:200],
            expected="an index.json of the OCI image layout",
        ) from error


def tag_of(entry: Entry) -> str | None:
    """The tag that an entry names its manifest by."""
    notes = entry.get("annotations")
    tag = notes.get(REF_NAME) if isinstance(notes, dict) else None
    return tag if isinstance(tag, str) else None


def _items(text: str, at: int) -> Generator[Entry, None, int]:
    """The objects of the array that begins at `at`; returns where it ends."""
    at = _past(text, at, "[")
    while text[at] != "]":
        item, at = _DECODER.raw_decode(text, at)
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
