"""What a memory package says about itself, and its ID."""

from __future__ import annotations

import re
from typing import Literal

from awareness_vllm.errors import InvalidMemoryId
from awareness_vllm.geometry import Geometry, Strict

MEMORY_ID = re.compile(r"mem_[0-9a-f]{32}")


class Manifest(Strict):
    """The JSON document in a package's safetensors metadata.

    `payload` is the sha256 over the other fields and the tensors; `engine` tells whose numerics
    the states have, so whether a load into the same server is exact. Without text (`has_text`) the
    package has no token ids and no spans either: all of them are zero.
    """

    format: Literal["awareness-memory/1"] = "awareness-memory/1"
    name: str | None = None
    geometry: Geometry
    tokens: int
    has_text: bool = True
    engine: Literal["transformers", "vllm"]
    versions: dict[str, str]
    payload: str


def check_id(memory_id: object) -> str:
    """The ID if it is well-formed.

    Raises:
        InvalidMemoryId: anything else, paths included.
    """
    if isinstance(memory_id, str) and MEMORY_ID.fullmatch(memory_id):
        return memory_id
    raise InvalidMemoryId(
        "malformed memory ID",
        found=repr(memory_id)[:80],
        expected="'mem_' and 32 hexadecimal digits",
        remedy="use an ID printed by `awareness capture` or `awareness list`",
    )
