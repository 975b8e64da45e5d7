"""The memories of a request: `memory_ids`, or `memory` as the long form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.schema import FrozenModel, PlainName

MEMORY_IDS, MEMORY = "memory_ids", "memory"
MAX_MEMORIES = 32
"""Memories in one request: far more than fit into any context, few enough to look up at once."""
MAX_REREAD = 256
"""Tokens of each memory that one request may have re-read or quoted: each passage that is re-read
is a request to the engine, whose blocks hold the memory up to there."""

Tokens = Annotated[int, Field(ge=0, le=MAX_REREAD, strict=True)] | Literal["auto"]


class MemoryRequest(FrozenModel):
    """`memory` in a request: the memories in the order in which they are read, and what to do where
    no certified way to load them reaches `quality_target`: read their text natively, fail, or use
    them all the same. Of each memory's tokens that the question points at, the model reads
    `reread` in their place, and `quote` once more before the question. With "auto" as many as the
    server's --reread and --quote say: only a prompt with a question mark has some quoted, and then
    none are re-read. `capture` publishes the prompt itself under that name instead."""

    ids: tuple[str, ...] = Field((), max_length=MAX_MEMORIES)
    quality_target: float | None = Field(None, gt=0, le=1, strict=True)
    on_low_quality: Literal["recompute", "fail", "use"] = "recompute"
    reread: Tokens = "auto"
    quote: Tokens = "auto"
    capture: PlainName | None = None


def parse_memory_request(body: Mapping[str, Any]) -> MemoryRequest | None:
    """The memories that a request's JSON body names, None where it names none.

    Raises:
        UnsupportedRequest: both forms at once, or one that cannot be used.
    """
    present = [field for field in (MEMORY_IDS, MEMORY) if body.get(field) is not None]
    if not present:
        return None
    if len(present) == 2:
        raise _refused("both forms", f"{MEMORY_IDS} or {MEMORY}, not both")
    (field,) = present
    value = {"ids": body[field]} if field == MEMORY_IDS else body[field]
    try:
        request = MemoryRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        expected = "the fields of docs/serving.md"
        raise _refused(f"{where}: {first['msg']}"[:200], expected) from error
    if bool(request.ids) == (request.capture is not None):
        raise _refused("ids and capture" if request.ids else "neither ids nor capture", "one")
    if len(set(request.ids)) < len(request.ids):
        raise _refused("the same memory twice", "each memory once")
    return request


def sent_field(body: Mapping[str, Any]) -> str:
    """The field by which a request names its memories, or asks for one."""
    value = body.get(MEMORY)
    if isinstance(value, Mapping) and value.get("capture") is not None:
        return f"{MEMORY}.capture"
    return MEMORY_IDS if value is None else MEMORY


def _refused(found: str, expected: str) -> UnsupportedRequest:
    return UnsupportedRequest(
        "the request's memories are not usable",
        found=found,
        expected=expected,
        remedy=f'send {{"{MEMORY_IDS}": ["mem_…"]}} or {{"{MEMORY}": {{"ids": ["mem_…"]}}}}',
    )
