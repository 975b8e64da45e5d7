"""What a request tells the connector: which memories its prompt begins with, and under what key."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from awareness_vllm.schema import FrozenModel
from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.secret import secret


class Part(FrozenModel):
    """One memory in a prompt: of its own ids all but the first `skip`, `tokens` in number. What is
    skipped (a BOS, a sink) stands at the prompt's beginning already."""

    memory: str
    wmatrix: str = ""
    skip: int = Field(0, ge=0)
    tokens: int = Field(gt=0)


class LoadParams(FrozenModel):
    """Under `kv_transfer_params["awareness"]`: the prompt begins with these memories, in this
    order; of their ids all but the last `tail` are loaded. `tenant` says from whose store."""

    parts: tuple[Part, ...] = Field(min_length=1)
    tail: int = Field(0, ge=0)
    tenant: str = ""
    caller_salt: str = ""

    @property
    def tokens(self) -> int:
        """Ids at the prompt's beginning that are memories'."""
        return sum(part.tokens for part in self.parts)

    @property
    def cache_salt(self) -> str:
        """Aligned KV is approximate: it shares cached blocks with nothing but the same memories, in
        the same order, through the same maps, for the same tenant and caller.

        Only this server can make it, or a client could write parameters itself, and with them name
        another tenant."""
        digest = hmac.digest(secret(), self.model_dump_json().encode(), "sha256")
        return f"awareness-{digest.hex()}"

    @classmethod
    def of(cls, kv_transfer_params: object, cache_salt: str | None) -> LoadParams | None:
        """The parameters of a request that our endpoint expanded, or None.

        A client can write any `kv_transfer_params`; without the salt that belongs to them they
        are ignored, so that nobody can place approximate KV where exact KV is looked up.
        """
        if not isinstance(kv_transfer_params, Mapping) or PARAMS_KEY not in kv_transfer_params:
            return None
        try:
            params = cls.model_validate(kv_transfer_params[PARAMS_KEY])
        except ValidationError:
            return None
        return params if params.cache_salt == cache_salt else None


def kv_transfer_params(params: LoadParams, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The request field that carries our parameters to the connector."""
    return {**(extra or {}), PARAMS_KEY: params.model_dump(mode="json")}
