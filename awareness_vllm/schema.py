"""The base of everything that is read from files, requests and configurations."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Base of every manifest: frozen, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
