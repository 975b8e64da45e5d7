"""Typed errors: what happened, what was found, what was expected, and the remedy.

Every error that a request can cause carries the HTTP status with which the server answers it.
"""

from __future__ import annotations


class AwarenessError(Exception):
    """Base of all errors of this package."""

    status = 400

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
        super().__init__(" ".join(parts))


class InvalidMemoryId(AwarenessError):
    """A memory ID that does not match the strict pattern."""


class UnsupportedRequest(AwarenessError):
    """A request that combines memories with something that cannot honour them."""


class ContextTooLong(AwarenessError):
    """A memory (and prompt) that does not fit into the target's context window."""


class Unauthorized(AwarenessError):
    """A request without an API key of one of the server's tenants."""

    status = 401


class MemoryNotFound(AwarenessError):
    """A well-formed ID that the store does not hold."""

    status = 404


class PackageCorrupt(AwarenessError):
    """A package whose bytes or manifest are not what its ID promises."""

    status = 422


class WMatrixCorrupt(AwarenessError):
    """A `.wmatrix` file that cannot be read or does not match its own manifest."""

    status = 422


class NoWMatrix(AwarenessError):
    """No W-Matrix leads from the package's source model to the served model."""

    status = 422


class UnsupportedModel(AwarenessError):
    """A model whose KV cache cannot be described or mapped."""

    status = 422


class LoadTimeout(AwarenessError):
    """A memory that was not aligned in time; its request reads it natively."""


class QualityUnreachable(AwarenessError):
    """A quality target above what any plan was measured to reach; `best` is the most that one was,
    None where nobody measured."""

    status = 422

    def __init__(
        self,
        what: str,
        *,
        best: float | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(what, found=found, expected=expected, remedy=remedy)
        self.best = best


class BadInput(AwarenessError):
    """Input of a command or function that cannot be used."""
