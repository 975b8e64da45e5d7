"""Tenants: a file gives each of them API keys and a store of its own.

Keys are kept as digests only, and no message names one: what goes into an error goes into logs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from awareness_vllm.errors import BadInput, Unauthorized
from awareness_vllm.files import read_text_file, sweep
from awareness_vllm.packages.store import Store
from awareness_vllm.schema import FrozenModel
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.registry import pulled_folder

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile(r"[!-~]+")
"""What a header can carry as one token: visible ASCII."""
BEARER = re.compile(rf"(?i:bearer) +({KEY.pattern})")
EXPECTED = '{"tenant": {"api_keys": ["…"], "store": "folder"}, …}'


class TenantEntry(FrozenModel):
    """One tenant in the file; a relative `store` is relative to the file. Unless `registry`, the
    tenant has nothing of the server's registry."""

    model_config = ConfigDict(hide_input_in_errors=True)

    api_keys: tuple[str, ...] = Field(repr=False, min_length=1)
    store: str = Field(min_length=1)
    registry: bool = True


@dataclass(frozen=True)
class Tenants:
    """The tenants of a server by their API keys: sha256 digests, each with its tenant's name.

    Without a file there is one tenant, "", and nobody needs a key.
    """

    digests: tuple[tuple[bytes, str], ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, path: str | Path | None) -> Tenants:
        """The tenants of a file; None means that there is none.

        Raises:
            BadInput: a file that is missing, or unclear about whose key opens which store.
        """
        if path is None:
            return cls()
        entries = _parse(Path(path))
        _check_keys(Path(path), entries)
        _folders(Path(path), entries)
        digests = {(_digest(key), name) for name, one in entries.items() for key in one.api_keys}
        return cls(tuple(sorted(digests)))

    def authenticate(self, authorization: str | None, api_key: str | None = None) -> str:
        """The tenant of a request by its HTTP headers Authorization (as OpenAI's clients send it)
        and x-api-key (as Anthropic's do).

        Raises:
            Unauthorized: there are tenants, and the headers have no key of theirs, or of two.
        """
        if not self.digests:
            return ""
        match = BEARER.fullmatch(authorization or "")
        keys = [key for key in (match and match[1], api_key) if key]
        if not keys:
            raise _unauthorized("no API key")
        # All of them, always: the time must not tell how far a guess came.
        owners = {
            name
            for key in map(_digest, keys)
            for known, name in self.digests
            if hmac.compare_digest(known, key)
        }
        if len(owners) != 1:
            raise _unauthorized("API keys of two tenants" if owners else "an unknown API key")
        return owners.pop()


def store_folders(path: str | Path | None, default: Path) -> dict[str, Path]:
    """Each tenant's folder of packages; without a file there is one tenant, "", with `default`.

    Nothing of the API keys is kept, so this is what a worker reads.

    Raises:
        BadInput: a file that cannot be read, or gives two tenants one store.
    """
    return {"": default} if path is None else _folders(Path(path), _parse(Path(path)))


def stores_of(config: ServingConfig) -> dict[str, Store]:
    """Each tenant's store, without what killed captures left there; what was pulled from the
    server's registry is in those of all tenants that may use it. Raises BadInput."""
    folders = store_folders(config.tenants, Path(config.store))
    for folder in folders.values():
        sweep(folder)
    pulled = pulled_folder(config.registry) if config.registry else None
    entries = _parse(Path(config.tenants)) if config.tenants else {}
    without = {tenant for tenant, entry in entries.items() if not entry.registry}
    return {
        tenant: Store(folder, None if tenant in without else pulled)
        for tenant, folder in folders.items()
    }


def _parse(path: Path) -> dict[str, TenantEntry]:
    """The file's entries by tenant, each of the right shape."""
    try:
        pairs = json.loads(read_text_file(path), object_pairs_hook=_Pairs)
    except BadInput as error:
        raise _bad(path, "cannot be read", error.found, "a JSON file in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _bad(path, "is not JSON", error, EXPECTED) from error
    if not isinstance(pairs, _Pairs) or not pairs:
        found = "an empty object" if isinstance(pairs, _Pairs) else type(pairs).__name__
        raise _bad(path, "names no tenants", found, EXPECTED)
    entries: dict[str, TenantEntry] = {}
    for number, (name, value) in enumerate(pairs, 1):
        # Until an entry has its shape it is called by number: in a file written the wrong way
        # round, what stands where a name should be is a key.
        entry = _entry(path, number, value)
        if not TENANT_NAME.fullmatch(name):
            found = f"an unusable name in entry {number}" if name else f"no name in entry {number}"
            raise _bad(path, "has a tenant without a usable name", found, TENANT_NAME.pattern)
        if name in entries:
            raise _bad(path, "names a tenant twice", name, "each tenant once")
        entries[name] = entry
    return entries


def _entry(path: Path, number: int, value: object) -> TenantEntry:
    """One tenant's entry; errors leave out its values."""
    what = f"has a wrong entry ({number})"
    if not isinstance(value, _Pairs):
        raise _bad(path, what, "not an object", EXPECTED)
    if len(fields := dict(value)) < len(value):
        raise _bad(path, what, "a field twice", EXPECTED)
    try:
        return TenantEntry.model_validate(fields)
    except ValidationError as error:
        complaints = {_complaint(one["loc"], one["msg"]) for one in error.errors()}
    # Outside of the handler: pydantic's error holds the values.
    raise _bad(path, what, "; ".join(sorted(complaints)), EXPECTED)


def _complaint(loc: tuple[int | str, ...], message: str) -> str:
    name = loc[0] if loc and loc[0] in TenantEntry.model_fields else "an unknown field"
    return f"{name}: {message}"


def _check_keys(path: Path, entries: Mapping[str, TenantEntry]) -> None:
    """Refuse keys that cannot be sent, or that belong to two tenants. Raises BadInput."""
    owners: dict[str, str] = {}
    for name, tenant in entries.items():
        for key in tenant.api_keys:
            if not KEY.fullmatch(key):
                found = f"one of {name} with other characters" if key else f"an empty one of {name}"
                raise _bad(path, "has an unusable API key", found, "visible ASCII, no spaces")
            if owners.setdefault(key, name) != name:
                found = f"{owners[key]} and {name}"
                raise _bad(path, "gives an API key to two tenants", found, "one tenant for a key")


def _folders(path: Path, entries: Mapping[str, TenantEntry]) -> dict[str, Path]:
    """Each tenant's store, absolute. Two tenants with one store would read each other's."""
    owners: dict[Path, str] = {}
    for name, tenant in entries.items():
        try:
            folder = (path.parent / Path(tenant.store).expanduser()).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            found = f"{tenant.store[:80]!r} of {name} ({error})"
            raise _bad(path, "has a store that cannot be a folder", found, "a path") from error
        if owners.setdefault(folder, name) != name:
            found = f"{owners[folder]} and {name} with {folder}"
            raise _bad(path, "gives a store to two tenants", found, "a store for each tenant")
    return {name: folder for folder, name in owners.items()}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _bad(path: Path, what: str, found: object, expected: str) -> BadInput:
    return BadInput(
        f"the tenants file {path} {what}",
        found=found,
        expected=expected,
        remedy="correct the file and start the server again",
    )


def _unauthorized(found: str) -> Unauthorized:
    return Unauthorized(
        "the request comes from no known tenant",
        found=found,
        expected="Authorization: Bearer, or x-api-key, and an API key of one of the server's "
        "tenants",
        remedy="ask the server's operator for a key",
    )


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: a dict would drop what is there twice."""
