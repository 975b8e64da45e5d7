"""What a request asks of memories: `memory_ids`, or `memory` as the long form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.schema import FrozenModel

SHORT, LONG = "memory_ids", "memory"
MOST = 32
"""Memories in one request: far more than fit into any context, few enough to look up at once."""


class MemoryRequest(FrozenModel):
    """`memory` in a request: the memories in the order in which they are read, and what to do where
    none of the certified ways to load them keeps `quality_target`: read their text natively, fail,
    or use them all the same. `capture` publishes the prompt itself under that name instead."""

    ids: tuple[str, ...] = Field((), max_length=MOST)
    quality_target: float | None = Field(None, gt=0, le=1, strict=True)
    on_low_quality: Literal["recompute", "fail", "use"] = "recompute"
    capture: str | None = Field(None, min_length=1, max_length=200)


def parse_memory_request(body: Mapping[str, Any]) -> MemoryRequest | None:
    """What a request's JSON body asks, None where it names no memory at all.

    Raises:
        UnsupportedRequest: both forms at once, or one that cannot be used.
    """
    present = [field for field in (SHORT, LONG) if body.get(field) is not None]
    if not present:
        return None
    if len(present) == 2:
        raise _refused("both forms", f"{SHORT} or {LONG}, not both")
    field = present[0]
    value = {"ids": body[field]} if field == SHORT else body[field]
    try:
        asked = MemoryRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _refused(f"{where}: {first['msg']}"[:200], "what the README's table says") from error
    if bool(asked.ids) == (asked.capture is not None):
        raise _refused("neither ids nor capture" if not asked.ids else "ids and capture", "one")
    if len(set(asked.ids)) < len(asked.ids):
        raise _refused("the same memory twice", "each memory once")
    return asked


def _refused(found: str, expected: str) -> UnsupportedRequest:
    return UnsupportedRequest(
        "the request's memories are not usable",
        found=found,
        expected=expected,
        remedy=f'send {{"{SHORT}": ["mem_…"]}} or {{"{LONG}": {{"ids": ["mem_…"]}}}}',
    )
