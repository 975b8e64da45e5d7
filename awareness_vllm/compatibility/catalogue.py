"""The catalogue: the memories and W-Matrices of a registry, or of this machine, for a page.

Of a registry the listings alone are read. All that they say is the word of who pushed them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from awareness_vllm.compatibility.html.figures import native
from awareness_vllm.compatibility.matrix import names_of, of_registry
from awareness_vllm.compatibility.report import Cell, Matrix
from awareness_vllm.errors import AwarenessError
from awareness_vllm.marketplace.maps import entry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.reference import Reference
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import Manifest, read_manifest, signer_of
from awareness_vllm.packages.store import Store
from awareness_vllm.passages import BUDGET
from awareness_vllm.trust.policy import Signers, TrustPolicy
from awareness_vllm.wmatrix.certificate import TAIL, Certificate, Interval, Plan
from awareness_vllm.wmatrix.listing import Listing, WMatrixListing
from awareness_vllm.wmatrix.manifest import WMatrixManifest
from awareness_vllm.wmatrix.plans import with_tail
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

MOST_CELLS = 1000
"""Cells of a matrix that is still looked at; of more pairs the list has the figures."""
Kind = Literal["memory", "map"]
Commands = dict[Kind, tuple[str, str]]
"""What stands before and after an item's key in the command that gets it."""


@dataclass(frozen=True)
class Item:
    """A memory or a map: `key` is what a command names it by; `tensors` the digest by which a
    latent names the map that made it. A certificate is `claimed` where nobody whom this machine
    trusts has signed it."""

    key: str
    name: str
    manifest: Manifest | WMatrixManifest
    digest: str
    bytes: int
    tensors: str = ""
    description: str | None = None
    license: str | None = None
    claimed: bool = False
    signed_by: str | None = None
    certificate_signed_by: str | None = None


@dataclass(frozen=True)
class Catalogue:
    """What the page shows: the matrix of all pairs (None where it would be too large to read), and
    `document`, the page's data, in JSON. `skipped` artefacts could not be read."""

    where: str
    matrix: Matrix | None
    document: dict[str, Any]
    memories: int
    maps: int
    skipped: int = 0


@dataclass
class _Models:
    """The models of a catalogue, told apart by what `Geometry.same_model` compares."""

    numbers: dict[tuple[object, ...], int] = field(default_factory=dict)
    geometries: list[Geometry] = field(default_factory=list)

    def number(self, geometry: Geometry) -> int:
        key = (geometry.weights, geometry.tokenizer, geometry.layers)
        if key not in self.numbers:
            self.numbers[key] = len(self.geometries)
            self.geometries.append(geometry)
        return self.numbers[key]

    def names(self) -> list[str]:
        """The names, by number; models that share one have their fingerprint appended."""
        return list(names_of(self.geometries).values())


def of_listings(
    listings: Iterable[Listing],
    reference: Reference,
    *,
    signers: Mapping[str, Signers] | None = None,
    skipped: int = 0,
    priors: Iterable[Cell] = (),
) -> Catalogue:
    """The catalogue of a registry, with commands that pull. Each file is in it once. `signers` are
    those of maps, by their files' digests."""
    known = signers or {}
    once = {listing.digest: listing for listing in listings}
    pull = (f"awareness pull {shlex.quote(str(reference))}:", "")
    items = [
        Item(
            key=listing.tag,
            name=listing.name,
            manifest=listing.manifest,
            digest=listing.digest,
            bytes=listing.bytes,
            tensors="" if isinstance(listing, PackageListing) else listing.tensors,
            description=listing.description,
            license=listing.license,
            **_signed(listing, known.get(listing.digest, Signers())),
        )
        for listing in once.values()
    ]
    return catalogue(
        items, str(reference), {"memory": pull, "map": pull}, skipped=skipped, priors=priors
    )


def _signed(listing: Listing, signers: Signers) -> dict[str, Any]:
    """The fields of a map's item that say who signed it."""
    if not isinstance(listing, WMatrixListing):
        return {}
    return {
        "claimed": entry_of(listing, signers).claimed,
        "signed_by": signers.wmatrix,
        "certificate_signed_by": signers.certificate,
    }


def of_files(
    store: Store,
    registry: Registry,
    trust: TrustPolicy | None = None,
    *,
    priors: Iterable[Cell] = (),
) -> Catalogue:
    """The catalogue of the packages in a store and of the maps at hand."""
    items, skipped = [], 0
    for memory in store.ids():
        try:
            items.append(_in_store(store, memory, trust or TrustPolicy()))
        except (AwarenessError, OSError):
            skipped += 1
    items += [
        Item(
            key=shlex.quote(str(entry.path)),
            name=entry.path.stem,
            manifest=entry.manifest,
            digest=entry.digest,
            bytes=entry.path.stat().st_size,
            tensors=entry.tensors,
            claimed=entry.claimed,
            signed_by=entry.signed_by,
            certificate_signed_by=entry.certificate_signed_by,
        )
        for entry in registry
    ]
    commands: Commands = {
        "memory": ("awareness inspect ", f" --store {shlex.quote(str(store.folder))}"),
        "map": ("awareness inspect ", ""),
    }
    return catalogue(items, "this machine", commands, skipped=skipped, priors=priors)


def _in_store(store: Store, memory: str, trust: TrustPolicy) -> Item:
    path = store.path(memory)
    manifest = read_manifest(path)
    return Item(
        key=memory,
        name=manifest.name or memory,
        manifest=manifest,
        digest="",
        bytes=path.stat().st_size,
        signed_by=signer_of(path, trust) if trust else None,
    )


def catalogue(
    items: Sequence[Item],
    where: str,
    commands: Commands,
    *,
    skipped: int = 0,
    priors: Iterable[Cell] = (),
) -> Catalogue:
    """The catalogue of some items."""
    models, memories, maps, entries = _Models(), [], [], []
    for item in items:
        if isinstance(item.manifest, Manifest):
            memories.append(_memory(item, item.manifest, models))
        else:
            path = Path(f"{item.name.replace('/', '-')}.wmatrix")
            entry = WMatrixEntry(
                path,
                item.manifest,
                item.digest,
                certificate_signed_by=item.certificate_signed_by,
                claimed=item.claimed,
            )
            maps.append(_map(item, entry, models))
            entries.append(entry)
    matrix = of_registry(Registry(tuple(entries)), priors)
    readable = len(matrix.sources) * len(matrix.targets) <= MOST_CELLS
    document = {
        "models": models.names(),
        "memories": memories,
        "maps": maps,
        "commands": commands,
    }
    return Catalogue(
        where=where,
        matrix=matrix if readable and matrix.cells else None,
        document=document,
        memories=len(memories),
        maps=len(maps),
        skipped=skipped,
    )


def _memory(item: Item, manifest: Manifest, models: _Models) -> list[Any]:
    """A memory's row: key, name, source, tokens, bytes, description, licence, whether it has its
    text, facts by name; of a latent its target and the tensors of the map that made it, else twice
    null."""
    latent = manifest.latent
    facts: list[tuple[str, str]] = [("engine", manifest.engine)]
    if latent is not None:
        facts += [("latent of", latent.package), ("stored in", latent.dtype)]
        facts.append(("map's tensors, sha256", latent.wmatrix))
    if manifest.edition_of:
        facts.append(("edition of", manifest.edition_of))
    if item.signed_by:
        facts.append(("signed by", item.signed_by))
    return [
        *(item.key, item.name, models.number(manifest.geometry), manifest.tokens, item.bytes),
        *(item.description, item.license, manifest.has_text, facts),
        *((models.number(latent.target), latent.wmatrix) if latent else (None, None)),
    ]


def _map(item: Item, entry: WMatrixEntry, models: _Models) -> list[Any]:
    """A map's row: key, name, source, target, bytes, description, licence, whether it reads text,
    certificate or null, facts by name, the digest of its tensors."""
    manifest, certificate = entry.manifest, entry.certificate
    facts = [
        ("sha256", item.digest),
        ("source layers read", f"{len(manifest.layers)} of {len(manifest.source.layers)}"),
        ("rank", f"{manifest.rank:,}"),
        ("anchors", f"{manifest.anchors.tokens:,} tokens"),
    ]
    facts += [("stored in", manifest.quantization)] if manifest.quantization else []
    facts += [("signed by", item.signed_by)] if item.signed_by else []
    if item.certificate_signed_by:
        facts.append(("certificate signed by", item.certificate_signed_by))
    return [
        *(item.key, item.name, models.number(manifest.source), models.number(manifest.target)),
        *(item.bytes, item.description, item.license, manifest.reads_tokens),
        None if certificate is None else _certificate(certificate, item.claimed),
        *(facts, item.tensors),
    ]


def _certificate(certificate: Certificate, claimed: bool) -> dict[str, Any]:
    context = certificate.protocol.context
    served = with_tail(certificate, context, TAIL, BUDGET)
    counts = certificate.counts
    return {
        "claimed": claimed,
        "retention": _figures(certificate.retention),
        "margin": _figures(served.margin),
        "facts": _figures(certificate.facts) if counts.get("cases") else None,
        "measured": f"{certificate.measured}",
        "hardware": certificate.hardware,
        "texts": f"{counts['texts']:,} texts of {context:,} tokens",
        "cases": counts.get("cases", 0),
        "tier": certificate.tier,
        "plans": [_plan(plan) for plan in certificate.plans],
    }


def _plan(plan: Plan) -> list[Any]:
    """A plan's row: tokens, what is read natively, cost, retention, best control and its name,
    margin, facts and their margin."""
    best = max(plan.controls, key=lambda name: plan.controls[name].mean, default=None)
    return [
        *(plan.context, native(plan.tail, plan.reread), round(plan.cost, 3)),
        _figures(plan.retention),
        None if best is None else round(plan.controls[best].mean, 4),
        *(best, _figures(plan.margin), _figures(plan.facts), _figures(plan.facts_margin)),
    ]


def _figures(interval: Interval | None) -> list[float] | None:
    if interval is None:
        return None
    return [round(x, 4) for x in (interval.mean, interval.ci_low, interval.ci_high)]
