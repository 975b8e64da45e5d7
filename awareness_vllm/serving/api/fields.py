"""Fields that name memories where nobody reads them: refused, for an answer without the memory
would look like one with it."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.request import MEMORY, MEMORY_IDS

FIELDS = (MEMORY_IDS, MEMORY)
ID_PREFIX = "mem_"
EXTRA_BODY = "extra_body"
"""The parameter by which OpenAI's Python client takes further fields; it never sends it itself."""
SPELLINGS = ("memoryids", "memoryid", "memories", "memory")
LONGEST_NAME = 32
SIMILARITY = 0.81
"""At most a letter or two away, by difflib's measure."""


def check_fields(body: Any, query: Mapping[str, str], ignorant: str | None = None) -> None:
    """Refuse a request with a field that names memories where it would be ignored.

    Args:
        body: of the request, as JSON.
        query: the parameters of its URL.
        ignorant: the path of a route that takes no memories at all.

    Raises:
        UnsupportedRequest: its `parameter` is that field.
    """
    fields = body if isinstance(body, dict) else {}
    present = [field for field in FIELDS if fields.get(field) is not None]
    if ignorant is not None and present:
        raise _refused(present[0], ignorant)
    for field in misplaced(fields, query, named=bool(present)):
        raise _refused(field, ignorant)


def misplaced(fields: dict[str, Any], query: Mapping[str, str], *, named: bool) -> Iterator[str]:
    """The fields that seem to name memories, in other places than the two that are read. Where a
    request has `named` its memories there, it may also note them elsewhere, as in `metadata`."""
    yield from (f"?{name}" for name in query if is_similar(name))
    for name, value in fields.items():
        if name not in FIELDS and value is not None and names_memories(name, value):
            yield name
    extra = fields.get(EXTRA_BODY)
    if isinstance(extra, dict):
        yield from (f"{EXTRA_BODY}.{name}" for name in extra if is_similar(name))
    if named:
        return
    for name, value in fields.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from (f"{name}.{place}" for place in places_in(inner))


def places_in(fields: dict[str, Any]) -> Iterator[str]:
    """The names in an object, and in the objects in it, that have a memory's ID beside them."""
    for name, value in fields.items():
        if "mem" in name.casefold() and has_id(value):
            yield name
        elif isinstance(value, dict):
            yield from (
                f"{name}.{one}"
                for one, inner in value.items()
                if "mem" in one.casefold() and has_id(inner)
            )


def names_memories(name: str, value: object) -> bool:
    """Whether a field of the request itself was meant to name memories: by its own name, or by a
    name that is less similar and a memory's ID."""
    return is_similar(name) or ("mem" in name.casefold() and has_id(value))


@functools.lru_cache(1024)
def _is_similar(letters: str) -> bool:
    return bool(difflib.get_close_matches(letters, SPELLINGS, n=1, cutoff=SIMILARITY))


def is_similar(name: str) -> bool:
    """Whether a name is one of FIELDS, or another spelling of it."""
    return len(name) <= LONGEST_NAME and _is_similar(re.sub("[^a-z]", "", name.casefold()))


def has_id(value: object) -> bool:
    """Whether a value is a memory's ID, or directly holds one."""
    values = value.values() if isinstance(value, dict) else [value]
    flat = [one for inner in values for one in (inner if isinstance(inner, list) else [inner])]
    return any(isinstance(one, str) and one.startswith(ID_PREFIX) for one in flat)


def _refused(field: str, ignorant: str | None) -> UnsupportedRequest:
    found = field[:80]
    if ignorant is None:
        error = UnsupportedRequest(
            "a field names memories where nothing reads it",
            found=found,
            expected=f"{MEMORY_IDS} or {MEMORY} beside model, in the request's JSON",
            remedy=f'send {{"{MEMORY_IDS}": ["mem_…"]}}; OpenAI\'s Python client sends it where a '
            f'method is called with {EXTRA_BODY}={{"{MEMORY_IDS}": ["mem_…"]}}',
        )
    else:
        error = UnsupportedRequest(
            f"{ignorant[:80]} takes no memories",
            found=found,
            expected="memories on /v1/completions, /v1/chat/completions, /v1/responses, "
            "/v1/messages or /v1/messages/count_tokens",
            remedy=f"use one of these, or leave out {found}",
        )
    error.parameter = found
    return error
