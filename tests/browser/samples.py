"""Reports and matrices to look at: all that can be known, a store, and next to nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from awareness_vllm.compatibility.catalogue import Catalogue, of_listings
from awareness_vllm.compatibility.report import (
    REMAINDER,
    Action,
    Basis,
    Cell,
    CompatibilityReport,
    Curve,
    Matrix,
    RiskFactor,
    Share,
)
from awareness_vllm.oci.reference import Reference
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import LATENT_FORMAT, Manifest, StoredLatent
from awareness_vllm.wmatrix.certificate import Interval
from awareness_vllm.wmatrix.heads import Head, HeadShares
from awareness_vllm.wmatrix.listing import WMatrixListing
from awareness_vllm.wmatrix.manifest import read_manifest

HOSTILE = """<script>document.title='taken'</script><img src=x onerror="document.title='taken'">"""
DIGEST = "5c1f" * 16
MEASURED = Basis(kind="measured", source="48 texts of 300 tokens, 2026-11-23", digest=DIGEST)
PRIOR = Basis(kind="prior", source="the published compatibility matrix")
PUBLISHED = ("GPT-4", "GPT-4o", "Claude 3.5", "Claude 3 Opus", "LLaMA 3.1 70B", "Mistral Large")


def interval(mean: float, below: float = 0.0, above: float | None = None) -> Interval:
    above = below if above is None else above
    return Interval(mean=mean, ci_low=mean - below, ci_high=mean + above)


CONDITIONS = {
    "native": {"nll": 2.903, "kl": 0.0, "top1": 1.0, "exact_match": 0.75},
    "memory": {"nll": 3.005, "kl": 0.167, "top1": 0.816, "exact_match": 0.44},
    "memory_tail_48": {"nll": 2.953, "kl": 0.083, "top1": 0.865, "exact_match": 0.42},
    "tokens_only": {"nll": 3.716, "kl": 0.86, "top1": 0.621, "exact_match": 0.0},
    "wrong_memory": {"nll": 4.161, "kl": 1.309, "top1": 0.539, "exact_match": 0.0},
    "none": {"nll": 3.865, "kl": 1.01, "top1": 0.607},
}
CURVES = (
    Curve(
        tail=0,
        contexts=(300, 1000, 2000),
        retention=(interval(0.894, 0.028), interval(0.84, 0.04), interval(0.778, 0.07)),
    ),
    Curve(
        tail=48,
        contexts=(300, 1000, 2000),
        retention=(interval(0.948, 0.023), interval(0.912, 0.027), interval(0.853, 0.06)),
    ),
    Curve(
        tail=320,
        contexts=(1000, 2000),
        retention=(interval(0.982, 0.02), interval(0.905, 0.065)),
    ),
)
KINDS = {
    "crawl": interval(0.909, 0.04),
    "wordnet": interval(0.883, 0.04),
    "debian-history-of-the-project": interval(0.844, 0.006),
    HOSTILE: interval(0.62, 0.1),
}
SHARES = (
    Share(source="dimensional projection", share=interval(0.08, 0.03), prior=0.30),
    Share(source="head redistribution", share=interval(0.21, 0.05), prior=0.25),
    Share(source="positional re-encoding", share=interval(0.62, 0.08), prior=0.20),
    Share(source="layer depth mismatch", share=interval(0.13, 0.05), prior=0.15),
    Share(source="activation mismatch", share=interval(-0.09, 0.04), prior=0.10),
    Share(source=REMAINDER, share=interval(0.05, 0.02), prior=None),
)


def full(basis: Basis | None = MEASURED, name: str = "smollm2-135m") -> CompatibilityReport:
    """A report in which everything is known."""
    return CompatibilityReport(
        memory="mem_bd6f7b990b5b59a9e55cc9734d1913a4",
        source=name,
        target="gemma3-270m",
        tokens=1840,
        compatibility_score=0.912,
        estimated_retention=0.912,
        ci_low=0.885,
        ci_high=0.939,
        basis=basis,
        level="Good",
        recommendation="Recommended",
        facts=interval(0.58, 0.17, 0.18),
        head_mapping_quality=0.834,
        positional_compatibility=0.99,
        positional_basis=PRIOR,
        target_memory_gb=0.0339,
        estimated_load_time_s=0.367,
        load_times_s={"warm": 0.094, "hot": 0.09, "native prefill": 1.898},
        risk_factors=(
            RiskFactor(description="Codes are kept, cities mostly are not", impact="medium"),
            RiskFactor(description="No certificate covers a context this long", impact="high"),
            RiskFactor(description=f"Text by {HOSTILE}", impact="low"),
        ),
        actions=(
            Action(description="Read the last 48 tokens natively", gain=0.036, basis="measured"),
            Action(description="Fit with more anchors", gain=0.012, basis="estimated"),
            Action(description="Route through a third model", gain=None, basis="estimated"),
        ),
        conditions=CONDITIONS,
        curves=CURVES,
        kinds=KINDS,
        degradation=SHARES,
    )


def hostile() -> CompatibilityReport:
    """A report whose free texts are all markup, each with its field's name before it."""

    def text(field: str) -> str:
        return f"{field} {HOSTILE}"

    basis = Basis(kind="measured", source=text("basis"), digest=text("digest"))
    update = dict(
        memory=text("memory"),
        target=text("target"),
        recommendation=text("recommendation"),
        positional_basis=Basis(kind="prior", source=text("positional_basis")),
        load_times_s={text("load_times_s"): 1.0},
        risk_factors=(RiskFactor(description=text("risk_factors"), impact="low"),),
        actions=(Action(description=text("actions"), gain=None, basis="estimated"),),
        conditions={text("conditions"): {text("metric"): 1.0}},
        kinds={text("kinds"): interval(0.9)},
        degradation=(Share(source=text("degradation"), share=interval(1), prior=None),),
    )
    return full(basis, text("source")).model_copy(update=update)


def empty() -> CompatibilityReport:
    """A report in which next to nothing is known."""
    return CompatibilityReport(
        memory="mem_" + "0" * 32,
        source="a model of nobody's",
        target="x" * 120,
        tokens=0,
        compatibility_score=None,
        estimated_retention=None,
        ci_low=None,
        ci_high=None,
        basis=None,
        level=None,
        recommendation="Nobody knows: certify a W-Matrix, or check with --measure",
        head_mapping_quality=None,
        positional_compatibility=None,
        positional_basis=None,
        target_memory_gb=None,
        estimated_load_time_s=None,
    )


def store() -> Matrix:
    """Measured cells, an uncertified one, pairs that nobody knows, and published cells."""
    small = ("smollm2-135m", "gemma3-270m", f"tuned {HOSTILE}")
    kept = {
        (small[0], small[1]): interval(0.894, 0.026, 0.029),
        (small[1], small[0]): interval(0.834, 0.04, 0.038),
        (small[1], small[2]): interval(1.001, 0.006, 0.004),
        (small[0], small[2]): interval(0.763, 0.069, 0.077),
        (small[2], small[0]): None,
    }
    cells = [
        Cell(source=a, target=b, retention=kept[a, b], basis=MEASURED if kept[a, b] else None)
        for a, b in kept
    ]
    for i, a in enumerate(PUBLISHED):
        for j, b in enumerate(PUBLISHED):
            about = 0.99 if i == j else 0.97 - 0.03 * abs(i - j)
            cells.append(Cell(source=a, target=b, retention=interval(about), basis=PRIOR))
    names = (*small, *PUBLISHED)
    return Matrix(sources=names, targets=names, cells=tuple(cells))


def heads(layers: int = 15, each: int = 3, down: int = 18) -> HeadShares:
    """A map whose target layers listen to source layers of the same depth."""
    parts = ("key", "value")
    across = tuple(Head(p, 2 * n, h) for p in parts for n in range(layers) for h in range(each))
    rows = tuple(Head(p, n, 0) for p in parts for n in range(down))
    far = [[abs(a.layer / layers / 2 - r.layer / down) for a in across] for r in rows]
    same = np.array([[1.0 if a.part == r.part else 0.35 for a in across] for r in rows])
    shares = same * np.exp(-6 * np.array(far)) * (1 + np.arange(len(across)) % each)
    shares *= 0.8 / shares.sum(1, keepdims=True)
    return HeadShares("smollm2-135m", "gemma3-270m", across, rows, shares)


MAP = Path(__file__).parents[2] / "maps/smollm2-135m--gemma3-270m.wmatrix"
TURNED = "\u05e9\u05dc\u05d5\u05dd <b>abc</b> 123"
"""A name that is written from right to left."""
TALL = "Z" + "\u0300\u0316" * 99
"""A name whose marks would cover the lines above and below."""


def catalogue(memories: int = 60) -> Catalogue:
    """Listings of three models: a certified map, one that is not, and memories, some with names
    that would do harm, and two latents, one of them of a map that is not listed."""
    certified = read_manifest(MAP)
    third = certified.target.model_copy(update={"name": HOSTILE, "weights": "f" * 64})
    other = certified.model_copy(update={"source": third, "certificate": None})
    maps = [
        WMatrixListing(
            digest=f"{i:064x}",
            bytes=10**7,
            manifest=manifest,
            tensors="ab"[i] * 64,
            description=HOSTILE,
        )
        for i, manifest in enumerate((certified, other))
    ]
    models = (certified.source, certified.target, third)
    latents = {
        i: StoredLatent(
            package="mem_" + "a" * 32,
            wmatrix=made_by * 64,
            target=certified.target,
            tokens=90,
            rank=576,
            dtype="int8",
        )
        for i, made_by in ((12, "c"), (15, "a"))
    }
    names = {0: HOSTILE, 3: TURNED, 6: TALL, 9: "x" * 200}
    listings = [
        PackageListing(
            digest=f"{i + 100:064x}",
            bytes=23_040 * 100 * (i + 1),
            manifest=Manifest(
                geometry=models[i % 3],
                tokens=100 * (i + 1),
                engine="transformers",
                versions={},
                payload="",
                name=names.get(i, f"Report {i}"),
                **({"format": LATENT_FORMAT, "latent": latents[i]} if i in latents else {}),
            ),
            license="CC0-1.0" if i % 2 else None,
            description="A chapter on gardening" if i == 7 else None,
        )
        for i in range(memories)
    ]
    return of_listings((*listings, *maps), Reference.parse("oci://registry.example.com/a/b"))
