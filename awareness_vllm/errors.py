"""Typed errors: what happened, what was found, what was expected, and the remedy.

Every error that a request can cause carries the HTTP status of the server's response.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal or a log obeys instead of showing it: control characters (C0, C1), ends of lines,
marks that turn the direction of writing; and lone surrogates, which no output can encode."""


def escaped(text: str) -> str:
    """A text in which control characters are visible as escapes, line ends and tabs too: a string
    that came with a file or a request, fit for one line of a terminal or a log."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class AwarenessError(Exception):
    """Base of all errors of this package."""

    status = 400
    parameter: str | None = None
    """The field of a request that is at fault, where the error itself knows it."""

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.found, self.expected, self.remedy = what, found, expected, remedy
        parts = [what.rstrip(".") + "."]
        if found is not None:
            parts.append(f"Found: {found}.")
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if remedy is not None:
            parts.append(f"Remedy: {remedy}.")
        # One line, whatever a file or a library wrote: errors go into logs and onto terminals.
        super().__init__(escaped(re.sub(r"\s*[\r\n]\s*", " ", " ".join(parts))))


class InvalidMemoryId(AwarenessError):
    """A malformed memory ID."""


class UnsupportedRequest(AwarenessError):
    """A request that combines memories with an option that excludes them."""


class ContextTooLong(AwarenessError):
    """A memory (and prompt) that does not fit into the target's context window."""


class Unauthorized(AwarenessError):
    """A request without an API key of one of the server's tenants."""

    status = 401


class CaptureNotAllowed(AwarenessError):
    """A capture on a server whose operator has not allowed any."""

    status = 403


class TooManyLoads(AwarenessError):
    """More cold memories at once than the server loads; the request may be sent again soon."""

    status = 429


class StorageFull(AwarenessError):
    """What a quota or the disk has no room for, or a disk that nothing can be written to."""

    status = 507


class NotAvailable(AwarenessError):
    """A part of the published interface that does not exist yet."""

    status = 501


class MemoryNotFound(AwarenessError):
    """A well-formed ID of which the store has no package."""

    status = 404


class PackageCorrupt(AwarenessError):
    """A package whose bytes or manifest contradict its ID."""

    status = 422


class PackageTooLarge(AwarenessError):
    """A package whose file is larger than the server loads."""

    status = 422


class WMatrixCorrupt(AwarenessError):
    """A `.wmatrix` file that cannot be read or contradicts its own manifest."""

    status = 422


class SignatureInvalid(AwarenessError):
    """A file without the signature that it needs, or with one that does not prove what it says."""

    status = 422


class NoWMatrix(AwarenessError):
    """No W-Matrix from the package's source model to the served model."""

    status = 422


class UnsupportedServer(AwarenessError):
    """A vLLM whose version, flags or other plugins keep memories from being served right: it does
    not start."""


class UnsupportedModel(AwarenessError):
    """A model whose KV cache cannot be described or mapped."""

    status = 422


class LoadTimeout(AwarenessError):
    """A memory that was not aligned in time; the request falls back to reading the text."""


class OutOfDeviceMemory(AwarenessError):
    """Maps that a device has no room for beside the KV cache, at start; a load that it had no room
    for, which falls back to reading the text."""


class PassageMissing(AwarenessError):
    """A re-read passage that is no longer kept; the request falls back to reading the text."""


class QualityUnreachable(AwarenessError):
    """A quality target above every measured plan; `best` is the highest measured retention, None
    without a measurement."""

    status = 422

    def __init__(self, what: str, *, best: float | None = None, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.best = best


class RegistryError(AwarenessError):
    """A registry that cannot be reached, or answers what it should not."""

    status = 502


class RegistryDenied(RegistryError):
    """A registry that does not let this user in."""

    status = 403


class ArtefactNotFound(RegistryError):
    """A tag or a digest that a repository does not have."""

    status = 404


class ArtefactCorrupt(RegistryError):
    """An artefact whose bytes, size or media type contradict its descriptor or its listing."""

    status = 422


class RegistryTimeout(RegistryError):
    """A registry that did not answer, or did not send a whole artefact, in time."""

    status = 504


class BadInput(AwarenessError):
    """Unusable input of a command or function."""


def similar_names(name: object, names: Iterable[str]) -> list[str]:
    """Up to five of the names that an unknown one may be meant for, the most similar first."""
    by_case = {known.casefold(): known for known in names}
    matches = difflib.get_close_matches(str(name).casefold(), by_case, n=5, cutoff=0.5)
    return [by_case[match] for match in matches]
