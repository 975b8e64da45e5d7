"""One memory on one target: all that is known of the two before anything is loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from awareness_vllm.compatibility.degradation import Degradation, load_for
from awareness_vllm.compatibility.models import Model, model
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import AwarenessError, BadInput
from awareness_vllm.packages.manifest import Manifest, read_manifest
from awareness_vllm.packages.store import locate
from awareness_vllm.wmatrix.certificate import Certificate, Interval
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry
from awareness_vllm.wmatrix.verdict import Verdict, verdict

if TYPE_CHECKING:
    from awareness_vllm.packages.file import Package


class Listing(Protocol):
    """Whatever is offered, if it says which model it comes from and how long it is."""

    @property
    def source_model(self) -> str: ...
    @property
    def token_count(self) -> int: ...


@dataclass(frozen=True)
class Subject:
    """The memory that is asked about; of a listing there is neither manifest nor file."""

    name: str
    source: Model
    tokens: int
    manifest: Manifest | None = None
    path: Path | None = None

    @property
    def bytes(self) -> int | None:
        """Of the file, or what its states alone would take."""
        if self.path is not None:
            return self.path.stat().st_size
        if self.source.geometry is None:
            return None
        return 2 * self.source.geometry.width * self.tokens


@dataclass(frozen=True)
class CheckContext:
    """A memory, a target and what lies between them.

    `tokens` are the memory's as the target counts them, or as the source does where nobody has
    asked the target's tokenizer. `kind` is the kind of its text, if anybody said.
    """

    subject: Subject
    target: Model
    config: TargetConfig
    registry: Registry
    tokens: int
    kind: str | None = None
    found: OnTheSpot | None = None

    @functools.cached_property
    def verdict(self) -> Verdict | None:
        """Whether a server loads the memory, and how; None where one of the two models is known by
        its published name alone."""
        source, target, name = self.subject.source.geometry, self.target.geometry, self.subject.name
        if source is None or target is None:
            return None
        limit = self.config.context_length or target.max_positions
        found = verdict(name, source, target, self.registry, self.subject.manifest)
        return found.within(name, self.tokens, limit)

    @property
    def exact(self) -> bool:
        """Whether the memory is the target's own."""
        return self.verdict is not None and self.verdict.exact

    @property
    def entry(self) -> WMatrixEntry | None:
        """The W-Matrix that realigns it."""
        return self.verdict.entry if self.verdict else None

    @property
    def refusal(self) -> AwarenessError | None:
        """The error with which a server refuses it."""
        return self.verdict.refusal if self.verdict else None

    @property
    def certificate(self) -> Certificate | None:
        return self.entry.certificate if self.entry else None

    @functools.cached_property
    def degradation(self) -> Degradation | None:
        """What the map's loss was measured to come from."""
        return load_for(self.entry) if self.entry else None


def subject(
    given: Listing | Package | str | Path, store: Path | None, registry: Registry
) -> Subject:
    """The memory that somebody asks about: a listing, a package, its file or its ID.

    Raises:
        InvalidMemoryId, MemoryNotFound, PackageCorrupt: no such memory, or a damaged one;
        BadInput: a listing of a model that nobody knows, or that says too little.
    """
    # A package, whose class is not imported here: it needs torch, and a check does not.
    if isinstance(manifest := getattr(given, "manifest", None), Manifest):
        return of_manifest(manifest, manifest.name or "a package")
    if isinstance(given, str | Path):
        path = locate(given, store)
        return of_manifest(read_manifest(path), path.stem, path)
    source, tokens = (getattr(given, name, None) for name in ("source_model", "token_count"))
    if not isinstance(source, str) or not isinstance(tokens, int) or tokens < 1:
        raise BadInput(
            "a memory listing says too little",
            found=f"source_model={source!r}, token_count={tokens!r}",
            expected="the name of a model, and how many tokens it read",
            remedy="give a package, its file or its ID instead",
        )
    return Subject(str(getattr(given, "id", "a listing")), model(source, registry), tokens)


def of_manifest(manifest: Manifest, name: str, path: Path | None = None) -> Subject:
    source = Model(manifest.geometry.name, manifest.geometry)
    return Subject(name, source, manifest.tokens, manifest, path)


@dataclass(frozen=True)
class OnTheSpot:
    """What was found: each arm's mean NLL in nats, and retention with the interval that the same
    of as much further text lies in: by chance alone, as it shows between stretches of the scored
    text. `context` and `scored` are tokens of the target."""

    conditions: dict[str, float]
    retention: Interval
    context: int
    scored: int
