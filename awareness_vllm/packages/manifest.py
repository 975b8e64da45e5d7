"""What a memory package says about itself, and its ID."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from awareness_vllm.errors import InvalidMemoryId, UnsupportedRequest
from awareness_vllm.geometry import Geometry, Strict

MEMORY_ID = re.compile(r"mem_[0-9a-f]{32}")


class Manifest(Strict):
    """The JSON document in a package's safetensors metadata.

    `payload` is the sha256 over the other fields and the tensors; `engine` tells whose numerics
    the states have, so whether a load into the same server is exact. Without text (`has_text`) the
    package has no token ids and no spans either: all of them are zero. `begins` says of each layer
    which token is the first whose states it holds, where a window has lost some, else nothing.
    """

    format: Literal["awareness-memory/1"] = "awareness-memory/1"
    name: str | None = None
    geometry: Geometry
    tokens: int
    has_text: bool = True
    engine: Literal["transformers", "vllm"]
    versions: dict[str, str]
    payload: str
    begins: tuple[int, ...] = ()

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k != "begins" or v}

    def begin(self, layer: int) -> int:
        """The first token whose states a layer holds."""
        return self.begins[layer] if self.begins else 0

    def check_whole(self, layers: Iterable[int]) -> None:
        """Prove that these layers hold the states of all tokens.

        Raises:
            UnsupportedRequest: a window has lost some.
        """
        if lost := [layer for layer in layers if self.begin(layer)]:
            raise UnsupportedRequest(
                "a sliding window has lost states of the memory",
                found=f"layers {lost} begin at tokens {[self.begin(i) for i in lost]}",
                expected="all tokens in every layer that is read",
                remedy="capture it with `awareness capture`, or fit a map that reads the layers "
                "without a window (`awareness fit --choice full`)",
            )


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
