"""The beginning of a prompt: the memories that a request named, as they stand one after another."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.packages.origin import Origin
from awareness_vllm.serving.params import LoadParams, Part
from awareness_vllm.trust.policy import Signers
from awareness_vllm.wmatrix.certificate import Plan
from awareness_vllm.wmatrix.plans import basis_of, cheapest, with_tail
from awareness_vllm.wmatrix.registry import WMatrixEntry

PromiseBasis = Literal["measured", "extrapolated", "claimed", "own"]


@dataclass(frozen=True)
class Promise:
    """The share of itself that a memory is known to keep, and how that is known; None where nobody
    measured it.

    `basis` is "own" for states of the served model itself, "measured" or "extrapolated" (a memory
    longer than all that were measured) by a certificate, "claimed" by one that no trusted key
    signed where one should. `margin` is the retention above what the same cost buys without a
    memory, None where the certificate has no controls; not positive, there is no reason to load.
    """

    retention: float | None = None
    basis: PromiseBasis | None = None
    margin: float | None = None


OWN = Promise(1.0, "own")


@dataclass(frozen=True)
class ResolvedMemory:
    """A memory that the served model can load: the sha256 of its file, its origin, its W-Matrix
    (None: an exact copy), its prompt ids, of which the first `prefix` stand only at the beginning
    of a prompt, and the trusted key that signed the package."""

    id: str
    digest: str
    origin: Origin
    wmatrix: WMatrixEntry | None
    ids: list[int]
    prefix: int
    signed_by: str | None = None

    @property
    def signers(self) -> Signers:
        """The trusted keys that signed the package, the W-Matrix and its certificate."""
        if self.wmatrix is None:
            return Signers(package=self.signed_by)
        return self.wmatrix.signers(self.signed_by)

    @property
    def tokens(self) -> int:
        """Tokens of the memory's text."""
        return len(self.ids) - self.prefix

    def promise(self, tail: int = 0, reread: int = 0) -> Promise:
        """What the memory keeps with its last `tail` tokens read natively, and up to `reread` more
        in place: by its certificate, or all of itself for a copy whose origin is known and for a
        text that is read natively from its first token on."""
        if tail >= self.tokens:
            return OWN
        if self.wmatrix is None:
            return Promise() if self.origin == "claimed" else OWN
        if (certificate := self.wmatrix.certificate) is None:
            return Promise()
        plan = with_tail(certificate, self.tokens, tail, reread)
        basis: PromiseBasis = basis_of(certificate, self.tokens)
        return Promise(
            plan.retention.mean,
            "claimed" if self.wmatrix.claimed else basis,
            plan.margin.mean if plan.margin else None,
        )

    def plan(self, quality_target: float, *, tails: bool, reread: int = 0) -> Plan | None:
        """The cheapest certified way to load that reaches the target, with up to `reread` tokens
        re-read in place, and keeps more than its cost buys without a memory; None for a copy.

        Raises:
            QualityUnreachable: no way reaches it, none was measured, or a stranger claims a copy.
        """
        if self.wmatrix is None:
            if self.origin != "claimed":
                return None
            raise QualityUnreachable(
                f"nobody vouches for the states of memory {self.id}",
                found="a package that was neither captured here nor signed by a trusted key",
                expected=f"a measured retention of {quality_target}",
                remedy="capture it here, start the server with --trust and its author's key, or "
                "leave quality_target out",
            )
        certificate = self.wmatrix.certificate
        if certificate is None:
            raise QualityUnreachable(
                f"the W-Matrix of memory {self.id} is not certified",
                found=self.wmatrix.path.name,
                expected=f"a measured retention of {quality_target}",
                remedy="`awareness certify`, or leave quality_target out",
            )
        if self.wmatrix.claimed:
            raise QualityUnreachable(
                f"the certificate of memory {self.id}'s W-Matrix is only claimed",
                found=f"{self.wmatrix.path.name}, whose certificate no trusted key signed",
                expected=f"a retention of {quality_target}, measured by whom this server trusts",
                remedy="`awareness sign --certificate` by who measured it, or leave quality_target "
                "out",
            )
        return cheapest(certificate, quality_target, self.tokens, tails=tails, reread=reread)


@dataclass(frozen=True)
class Prompt:
    """One memory after another, loaded but for the last `tail` tokens; with a `tail` of None the
    target reads all of them. In a chat, the ids of the template's `head` stand before them."""

    memories: tuple[ResolvedMemory, ...]
    tail: int | None
    tenant: str = ""
    caller_salt: str = ""
    head: tuple[int, ...] = ()
    reason: str = ""

    def with_head(self, head: Sequence[int]) -> Prompt:
        """The same memories after a chat template's head."""
        return replace(self, head=tuple(head))

    def recomputed(self, reason: str = "") -> Prompt:
        """The same memories, read by the target itself; the response says for what `reason`."""
        return replace(self, tail=None, reason=reason)

    @property
    def loads(self) -> bool:
        """Whether anything is loaded."""
        return self.tail is not None

    @property
    def skips(self) -> list[int]:
        """How many of each memory's first ids are left out: they stand only at the beginning."""
        skips = [memory.prefix for memory in self.memories]
        return skips if self.head else [0, *skips[1:]]

    @functools.cached_property
    def ids(self) -> list[int]:
        parts = zip(self.memories, self.skips, strict=True)
        return [*self.head, *(id for memory, skip in parts for id in memory.ids[skip:])]

    @functools.cached_property
    def params(self) -> LoadParams | None:
        """The load plan for the connector; None where nothing is loaded."""
        if self.tail is None:
            return None
        name = head_name(self.head)
        head = [Part(memory=name, digest=name, tokens=len(self.head))] if self.head else []
        parts = [
            Part(
                memory=memory.id,
                digest=memory.digest,
                wmatrix=memory.wmatrix.digest if memory.wmatrix else "",
                skip=skip,
                tokens=len(memory.ids) - skip,
                signers=memory.signers,
            )
            for memory, skip in zip(self.memories, self.skips, strict=True)
        ]
        return LoadParams(
            parts=(*head, *parts),
            tail=self.tail,
            tenant=self.tenant,
            caller_salt=self.caller_salt,
        )

    @property
    def promises(self) -> list[Promise]:
        """What each memory keeps. A copy keeps all of itself where it was captured, at the
        beginning of a prompt; anywhere else nobody has measured it."""
        if self.tail is None:
            return [OWN] * len(self.memories)
        tails = [0] * (len(self.memories) - 1) + [self.tail]
        moved = [bool(self.head or i) for i in range(len(self.memories))]
        return [
            Promise() if is_moved and not memory.wmatrix else memory.promise(tail)
            for memory, tail, is_moved in zip(self.memories, tails, moved, strict=True)
        ]

    @property
    def retention(self) -> list[float | None]:
        """The retention of each memory's promise."""
        return [promise.retention for promise in self.promises]

    def promised(self) -> dict[str, list[Any]]:
        """The fields of `report` that say what each memory keeps."""
        promises = self.promises
        return {
            "retention": [promise.retention for promise in promises],
            "basis": [promise.basis for promise in promises],
            "margin": [promise.margin for promise in promises],
        }

    def report(self) -> dict[str, Any]:
        """The report on the memories for a response."""
        return {
            "ids": [memory.id for memory in self.memories],
            "plan": "load" if self.loads else "recompute",
            "tokens": sum(memory.tokens for memory in self.memories),
            **({"reason": self.reason} if self.reason else {}),
            "native_tail": self.tail,
            **self.promised(),
            "origin": [memory.origin for memory in self.memories],
            "signed_by": [memory.signers.model_dump() for memory in self.memories],
        }


def head_name(ids: Sequence[int]) -> str:
    """A chat template's head as the workers know it: no memory has such an ID."""
    return f"head_{hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:32]}"
