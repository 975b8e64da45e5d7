"""A memory that the served model can load, and what is known of how much it keeps."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.models.tokens import Spans
from awareness_vllm.packages.origin import Origin
from awareness_vllm.passages.index import PassageIndex
from awareness_vllm.passages.words import WordVectors
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
    longer than all that were measured, or one whose states are rounded) by a certificate, "claimed"
    by one that no trusted key signed where one should. `margin` is the retention above what the
    same cost buys without a memory, None where the certificate has no controls; not positive, there
    is no reason to load.
    """

    retention: float | None = None
    basis: PromiseBasis | None = None
    margin: float | None = None


OWN = Promise(1.0, "own")


@dataclass(frozen=True)
class ResolvedMemory:
    """A memory that the served model can load: the sha256 of its file, its origin, its W-Matrix
    (None: an exact copy), its prompt ids, of which the first `prefix` stand only at the beginning
    of a prompt, the trusted key that signed the package, and its text with the bytes [T, 2] of the
    tokens after the prefix (None where nothing of it can be re-read), beside the served model's
    embeddings of words, where they can be read. Its states are `rounded` if they come of a latent
    in int8 or go into a cache in fp8."""

    id: str
    digest: str
    origin: Origin
    wmatrix: WMatrixEntry | None
    ids: list[int]
    prefix: int
    signed_by: str | None = None
    text: tuple[str, Spans] | None = None
    vectors: WordVectors | None = None
    rounded: bool = False

    @functools.cached_property
    def index(self) -> PassageIndex | None:
        """The passages that a question may point at, indexed with the first question; None for a
        copy, whose states are exact, and for a map without the memory's tokens."""
        if self.text is None:
            return None
        return PassageIndex.of(*self.text, self.prefix, vectors=self.vectors)

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
        basis: PromiseBasis = basis_of(certificate, self.tokens, rounded=self.rounded)
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
