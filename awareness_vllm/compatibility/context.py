"""One memory on one target: everything known of the two before anything is loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from awareness_vllm.compatibility.degradation import Degradation, load_for
from awareness_vllm.compatibility.models import Listing, Model, model
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import AwarenessError, BadInput
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import Manifest, StoredLatent, read_manifest, signer_of
from awareness_vllm.packages.store import locate
from awareness_vllm.trust.policy import Signers, TrustPolicy
from awareness_vllm.wmatrix.certificate import Certificate, Interval
from awareness_vllm.wmatrix.plans import PlanBasis, basis_of
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry
from awareness_vllm.wmatrix.verdict import Verdict, verdict

if TYPE_CHECKING:
    from awareness_vllm.packages.file import Package


class MemoryListing(Listing, Protocol):
    """An offer of a memory, if it names its model and its length."""

    @property
    def token_count(self) -> int: ...


@dataclass(frozen=True)
class MemoryInfo:
    """The memory to check. That of a registry's listing has no file but its `size`, one of another
    listing no manifest either. `tokens` are the source's, of a latent its target's; `signed_by` is
    the name of the trusted key that signed the package."""

    name: str
    source: Model
    tokens: int
    manifest: Manifest | None = None
    path: Path | None = None
    signed_by: str | None = None
    size: int | None = None

    @property
    def latent(self) -> StoredLatent | None:
        """What the memory holds instead of its source's states."""
        return self.manifest.latent if self.manifest else None

    @property
    def bytes(self) -> int | None:
        """The size of the file, or of the states alone, in 16 bits; None for an unknown shape."""
        if self.path is not None:
            return self.path.stat().st_size
        if self.size is not None:
            return self.size
        shape = self.source.shape
        return None if shape is None else 2 * shape.width * self.tokens


@dataclass(frozen=True)
class SelfTest:
    """The result of measuring a memory on its own last quarter: the mean NLL of each condition in
    nats, and retention with the interval that the retention of as much further text lies in (by
    chance alone, estimated from stretches of the scored text). `context` and `scored` are tokens of
    the target."""

    conditions: dict[str, float]
    retention: Interval
    context: int
    scored: int


@dataclass(frozen=True)
class CheckContext:
    """A memory, a target and what lies between them.

    `tokens` are the memory's as the target's tokenizer counts them, or as the source's does where
    the target's was not asked. `kind` is the kind of the text, None where it is unknown.
    `refused` is a server's refusal of the package that the verdict cannot know, as for a signature.
    """

    memory: MemoryInfo
    target: Model
    config: TargetConfig
    registry: Registry
    tokens: int
    kind: str | None = None
    self_test: SelfTest | None = None
    refused: AwarenessError | None = None

    @functools.cached_property
    def verdict(self) -> Verdict | None:
        """Whether a server loads the memory, and how; None where one of the two models is known by
        its published name alone."""
        source, target, name = self.memory.source.geometry, self.target.geometry, self.memory.name
        if source is None or target is None:
            return None
        limit = self.config.context_length or target.max_positions
        decided = verdict(name, source, target, self.registry, self.memory.manifest)
        return decided.within(name, self.tokens, limit)

    @property
    def exact(self) -> bool:
        """Whether the memory is the target's own."""
        return self.verdict is not None and self.verdict.exact

    @property
    def entry(self) -> WMatrixEntry | None:
        """The W-Matrix that realigns the memory."""
        return self.verdict.entry if self.verdict else None

    @property
    def refusal(self) -> AwarenessError | None:
        """The error with which a server refuses the memory."""
        return self.refused or (self.verdict.refusal if self.verdict else None)

    @property
    def signers(self) -> Signers:
        """The trusted keys that signed the package, the W-Matrix and its certificate."""
        package = self.memory.signed_by
        return self.entry.signers(package) if self.entry else Signers(package=package)

    @property
    def claimed(self) -> bool:
        """Whether the W-Matrix has a certificate that no trusted key signed, where one should."""
        return self.entry is not None and self.entry.claimed

    @property
    def rounded(self) -> bool:
        """Whether the target's cache gets other states than those that a certificate is of."""
        manifest = self.memory.manifest
        return self.config.rounds or (manifest is not None and manifest.rounded)

    @property
    def certificate(self) -> Certificate | None:
        return self.entry.certificate if self.entry else None

    @property
    def measured(self) -> bool:
        """Whether the memory's retention was measured: by a certificate that is of such memories
        and counts here, or without one on the memory itself."""
        if self.certificate is None:
            return self.self_test is not None
        return self.basis_of(self.certificate) == "measured"

    def basis_of(self, certificate: Certificate) -> PlanBasis | Literal["claimed"]:
        """How what the map's certificate says of the memory is known."""
        if self.claimed:
            return "claimed"
        return basis_of(certificate, self.tokens, rounded=self.rounded)

    @functools.cached_property
    def degradation(self) -> Degradation | None:
        """The measured sources of the map's loss."""
        return load_for(self.entry) if self.entry else None


def memory_info(
    memory: MemoryListing | Package | str | Path,
    store: Path | None,
    registry: Registry,
    trust: TrustPolicy | None = None,
) -> MemoryInfo:
    """The memory of a listing, a package, its file or its ID.

    Raises:
        InvalidMemoryId, MemoryNotFound, PackageCorrupt: no such memory, or a damaged one.
        BadInput: a listing of an unknown model, or one without model or length.
    """
    if isinstance(memory, PackageListing):
        info = of_manifest(memory.manifest, memory.name)
        return replace(info, size=memory.bytes)
    # A package, whose class is not imported here: it needs torch, and a check does not.
    if isinstance(manifest := getattr(memory, "manifest", None), Manifest):
        return of_manifest(manifest, manifest.name or "a package")
    if isinstance(memory, str | Path):
        path = locate(memory, store)
        signed_by = signer_of(path, trust) if trust else None
        return of_manifest(read_manifest(path), path.stem, path, signed_by)
    source, tokens = (getattr(memory, name, None) for name in ("source_model", "token_count"))
    if not isinstance(source, str) or not isinstance(tokens, int) or tokens < 1:
        raise BadInput(
            "a memory listing lacks its model or its length",
            found=f"source_model={source!r}, token_count={tokens!r}",
            expected="the name of a model, and a positive number of tokens",
            remedy="give a package, its file or its ID instead",
        )
    return MemoryInfo(str(getattr(memory, "id", "a listing")), model(source, registry), tokens)


def of_manifest(
    manifest: Manifest, name: str, path: Path | None = None, signed_by: str | None = None
) -> MemoryInfo:
    """The memory that a package's manifest describes."""
    source = Model(manifest.geometry.name, manifest.geometry)
    return MemoryInfo(name, source, manifest.rows, manifest, path, signed_by)
