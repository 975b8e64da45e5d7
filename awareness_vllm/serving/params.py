"""The load plan of a request, as it travels to the connector: signed in its `cache_salt`."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError

from awareness_vllm.packages.store import digest_in
from awareness_vllm.passages.index import Span
from awareness_vllm.schema import FrozenModel
from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.trust.policy import Signers

SECRET = "AWARENESS_SECRET"
"""An environment variable: vLLM's processes start each other and inherit it."""

Key = tuple[str, str]
"""The sha256 digests of a package's file and of its W-Matrix's, "" for a copy, or the name of an
edition: they name bytes, so that tenants can share what was made of them."""
EDITION = "edition"
"""Stands for a W-Matrix where the states are the served model's own, of the memory's text."""


DRAFT = "draft_"
"""Begins the name of an edition in the making, which stands for a memory in its own requests."""


def edition_name(before: Sequence[int]) -> str:
    """The name of the editions that were read after these ids: they are exact nowhere else. No
    digest begins so."""
    if not before:
        return EDITION
    return f"{EDITION}-{hashlib.sha256(array('q', before).tobytes()).hexdigest()[:32]}"


def is_edition(key: Key) -> bool:
    """Whether a key of the tiers is an edition's."""
    return key[1].startswith(EDITION)


Passage = tuple[Key, Span]
"""The name of a passage's own rows: of which memory, through which map, which of its positions."""


def is_of(key: Key, memory: str) -> bool:
    """Whether a key of the tiers is one of a memory's, through whichever map."""
    return digest_in(key[0]).startswith(digest_in(memory))


def secret() -> bytes:
    """The server's secret, which signs load plans; made by whichever process asks first."""
    return os.environ.setdefault(SECRET, secrets.token_hex(32)).encode()


def signature(*what: Any) -> str:
    """The server's signature of JSON values: only its own processes can make one."""
    return hmac.digest(secret(), json.dumps(what).encode(), "sha256").hex()


def is_signed(given: object, *what: Any) -> bool:
    """Whether a signature is the server's own, of these values."""
    return isinstance(given, str) and hmac.compare_digest(
        given.encode(errors="replace"), signature(*what).encode()
    )


class Part(FrozenModel):
    """One memory in a prompt, in the file with the sha256 `digest`: `tokens` ids, its own but for
    the first `skip` (a BOS, a sink, which stand at the prompt's beginning already). `rereads` are
    laid over: passages that the model has read itself, by their positions among the memory's ids.
    By `signers` its blocks are not those of before a key was revoked."""

    memory: str
    digest: str = Field(min_length=1)
    wmatrix: str = ""
    skip: int = Field(0, ge=0)
    tokens: int = Field(gt=0)
    rereads: tuple[Span, ...] = ()
    signers: Signers = Signers()

    @property
    def key(self) -> Key:
        """The name of the aligned memory in the tiers, which tenants share."""
        return self.digest, self.wmatrix


class LoadParams(FrozenModel):
    """The load plan under `kv_transfer_params["awareness"]`: the prompt begins with these memories,
    in this order; of their ids all but the last `tail` are loaded, from the store of `tenant`.

    A request of the server's own may compute this tail to be kept as a `passage`. Its blocks, in
    which native states follow aligned ones, are its own: no other request has the same salt."""

    parts: tuple[Part, ...] = Field(min_length=1)
    tail: int = Field(0, ge=0)
    tenant: str = ""
    caller_salt: str = ""
    passage: bool = False

    @property
    def passage_name(self) -> Passage | None:
        """The passage that the request computes; None for a user's request."""
        (part, *_) = self.parts
        return (part.key, (self.tokens - self.tail, self.tokens)) if self.passage else None

    @property
    def is_internal(self) -> bool:
        """Whether the request is the server's own, and in no statistics."""
        return self.passage or self.parts[0].memory.startswith(DRAFT)

    @property
    def tokens(self) -> int:
        """Ids of memories at the prompt's beginning."""
        return sum(part.tokens for part in self.parts)

    @property
    def cache_salt(self) -> str:
        """The plan's signature, and the key of its blocks in the prefix cache.

        Aligned KV is approximate: it shares cached blocks only with the same memories, in the same
        order, through the same maps, for the same tenant and caller. Only this server can sign, or
        a client could write a plan of its own, and name another tenant in it.
        """
        digest = hmac.digest(secret(), self.model_dump_json().encode(), "sha256")
        return f"awareness-{digest.hex()}"

    @classmethod
    def of(cls, kv_transfer_params: object, cache_salt: str | None) -> LoadParams | None:
        """The plan of a request from our endpoint; None for any other request.

        A client can write any `kv_transfer_params`; without the signature they are ignored, so that
        nobody can place approximate KV where exact KV is looked up.
        """
        if not isinstance(kv_transfer_params, Mapping) or PARAMS_KEY not in kv_transfer_params:
            return None
        try:
            params = cls.model_validate(kv_transfer_params[PARAMS_KEY])
        except ValidationError:
            return None
        return params if params.cache_salt == cache_salt else None


def kv_transfer_params(params: LoadParams, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The request field that carries the plan to the connector, beside the client's own `extra`."""
    return {**(extra or {}), PARAMS_KEY: params.model_dump(mode="json")}


def draft_params(draft: str, tokens: int) -> LoadParams:
    """The plan of the requests that read an edition on from position `tokens`, whatever the prefix
    cache has lost."""
    return LoadParams(parts=(Part(memory=draft, digest=draft, tokens=tokens),))


def passage_params(part: Part, span: Span, tenant: str) -> LoadParams:
    """The plan of the request that computes a passage of a memory, read after the aligned states
    before it."""
    begin, end = span
    whole = part.model_copy(update={"skip": 0, "tokens": end, "rereads": ()})
    return LoadParams(parts=(whole,), tail=end - begin, tenant=tenant, passage=True)
