"""What `/v1/memories` answers, as clients see it in the OpenAPI schema."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from awareness_vllm.packages.manifest import Manifest
from awareness_vllm.schema import FrozenModel
from awareness_vllm.serving.resolved_memory import PromiseBasis


class UnauthorizedResponse(BaseModel):
    error: Literal["Unauthorized"]


class Memory(FrozenModel):
    """A package by its own manifest; one with an `error` has no more than its file's facts."""

    id: str
    object: Literal["memory"] = "memory"
    created: int | None = Field(
        None, description="Unix time at which the package was put into the store, or pulled"
    )
    bytes: int
    name: str | None = None
    source_model: str | None = None
    tokens: int | None = Field(None, description="Tokens of the source model")
    signed_by: str | None = Field(
        None, description="The trusted key that signed the package of this ID"
    )
    edition_of: str | None = Field(
        None, description="The memory whose text this package has, read by source_model"
    )
    latent_of: str | None = Field(
        None, description="The memory whose latent this package has, for the target of one map"
    )
    edition: bool = Field(
        False,
        description="Whether the served model has read the text and keeps its own states of it, as "
        "far as this front end knows",
    )
    location: Literal["store", "cache", "registry"] = Field(
        "store",
        description="The caller's store; the cache of what this server has pulled from its "
        "registry; or the registry, from which it is pulled at its first use",
    )
    error: str | None = None


class MemoryList(FrozenModel):
    """A page of the caller's memories, by ID: those in its store, and those of the registry that it
    has used since the server's start. Their bytes are checked before each use, not here."""

    object: Literal["list"] = "list"
    data: list[Memory]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Compatibility(FrozenModel):
    """A memory on this server's model, used by default and alone in a prompt."""

    loadable: bool
    wmatrix: str | None = Field(None, description="null and loadable: an exact copy")
    prompt_tokens: int | None = Field(
        None, description="Tokens that it adds to a prompt: a response's memory.tokens"
    )
    retention: float | None = Field(
        None,
        description="1 is as good as the model reading the text itself; null: not measured",
    )
    basis: PromiseBasis | None = Field(
        None, description="Of retention: measured, extrapolated, claimed, own; null: not measured"
    )
    margin: float | None = Field(
        None,
        description="Retention above what the same cost buys without a memory; null: not measured",
    )
    certified: bool = Field(False, description="Whether the W-Matrix has a certificate")
    claimed: bool = Field(
        False, description="Whether no trusted key signed that certificate, where one should"
    )
    wmatrix_signed_by: str | None = Field(None, description="A key of the server's trust file")
    certificate_signed_by: str | None = Field(None, description="A key of the same file")
    reason: str | None = Field(None, description="Why it cannot be loaded")


class MemoryDetail(Memory):
    manifest: Manifest
    compatibility: Compatibility


class MemoryLoad(FrozenModel):
    id: str
    object: Literal["memory.load"] = "memory.load"
    temperature: Literal["cold", "warm"] = Field(description="The memory before this call")


class MemoryEdition(FrozenModel):
    id: str = Field(description="A new memory, of the served model's own states")
    object: Literal["memory.edition"] = "memory.edition"
    edition_of: str
    name: str | None
    tokens: int


class MemoryEvicted(FrozenModel):
    id: str
    object: Literal["memory.evicted"] = "memory.evicted"
    evicted: bool = Field(
        description="Whether it was warm and is dropped: no other tenant uses it, and it is not "
        "pinned. The package stays in the store"
    )
