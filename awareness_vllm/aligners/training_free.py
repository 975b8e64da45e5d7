"""Training-free head mappings: registered functions that move position-free states from source
heads and layers to target heads and layers.

No two models share a basis, so little can be expected of them but between variants of one model:
`benchmarks/strategies.py` measures them in five arms, and using one warns with the result.

Layers correspond by depth. Where head dims differ, dims are cut off or padded with zeros: that
keeps the products of the source's keys with each other as far as it can, and no seed decides.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.models.geometry import Geometry, LayerGeometry, by_depth
from awareness_vllm.provenance import versions
from awareness_vllm.schema import FrozenModel
from awareness_vllm.wmatrix.certificate import Interval
from awareness_vllm.wmatrix.features import split_states
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.heads import Head, HeadSources
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

HeadMapping = Callable[[LayerGeometry, LayerGeometry, bool], Tensor]
"""Source layer, target layer, grouped to shares [target heads, source heads]; rows add up to 1."""
Merge = Callable[[Tensor, Tensor], Tensor]
"""Shares [Ht, Hs] and the source's keys [T, Hs, D] to each token's shares [T or 1, Ht, Hs]."""
Split = Callable[[Tensor, Tensor], Tensor]
"""States [T, Ht, D], and for each target head the number of heads before it with the same source
head [Ht], to states [T, Ht, D]."""
HEAD_MAPPINGS: dict[str, HeadMapping] = {}
MERGES: dict[str, Merge] = {}
SPLITS: dict[str, Split] = {}
FIGURES = Path(__file__).with_name("training_free.json")
"""The figures that `benchmarks/strategies.py --record` measured."""


class TrainingFreeWarning(UserWarning):
    """A training-free mapping is in use."""


def head_mapping(name: str) -> Callable[[HeadMapping], HeadMapping]:
    """Register a head mapping under the name that `configure` takes."""
    return lambda function: HEAD_MAPPINGS.setdefault(name, function)


def merge(name: str) -> Callable[[Merge], Merge]:
    """Register a function that merges several source heads into one."""
    return lambda function: MERGES.setdefault(name, function)


def split(name: str) -> Callable[[Split], Split]:
    """Register a function that splits one source head into several."""
    return lambda function: SPLITS.setdefault(name, function)


@head_mapping("uniform")
def uniform(source: LayerGeometry, target: LayerGeometry, grouped: bool) -> Tensor:
    """Shares by place: target head i of Ht takes the source heads at i/Ht … (i+1)/Ht.

    KV heads are in the order of the groups of query heads that they serve, so heads at the same
    place serve the same share of them (`grouped`). Otherwise heads are dealt out in turn.
    """
    if not grouped:
        count = min(source.heads, target.heads)
        dealt = torch.arange(target.heads)[:, None] % count == torch.arange(source.heads) % count
        return dealt / dealt.sum(1, keepdim=True)
    ours, theirs = (
        torch.linspace(0, 1, g.heads + 1, dtype=torch.float64) for g in (target, source)
    )
    low = torch.maximum(ours[:-1, None], theirs[:-1])
    high = torch.minimum(ours[1:, None], theirs[1:])
    return ((high - low).clamp_min(0) * target.heads).float()


@head_mapping("identity")
def identity(source: LayerGeometry, target: LayerGeometry, grouped: bool) -> Tensor:
    """Head by head, for models whose layers have the same heads.

    Raises:
        UnsupportedModel: the layers have other heads.
    """
    for field in ("heads", "head_dim"):
        ours, theirs = getattr(source, field), getattr(target, field)
        if ours != theirs:
            raise UnsupportedModel(
                f"head_mapping 'identity' cannot map these layers: {field} differs",
                found=f"{field}={ours} in the source, {field}={theirs} in the target",
                expected=f"the same {field} in both",
                remedy="head_mapping='learned', with a W-Matrix, or 'uniform'",
            )
    return torch.eye(target.heads)


@merge("mean")
def mean(shares: Tensor, keys: Tensor) -> Tensor:
    """The shares alone."""
    return shares[None]


@merge("weighted")
def weighted(shares: Tensor, keys: Tensor) -> Tensor:
    """The shares times the norm of each source head's key at this token: a head with a small key
    there does not thin the others out."""
    weights = shares * (keys.norm(dim=-1)[:, None] + 1e-6)
    return weights / weights.sum(-1, keepdim=True)


@split("repeat")
def repeat(states: Tensor, turn: Tensor) -> Tensor:
    """Copies of the source head."""
    return states


@split("projection")
def projection(states: Tensor, turn: Tensor) -> Tensor:
    """Copies rotated by fixed orthogonal matrices, the first by the identity: norms and products
    within a head stay, and the heads differ."""
    turns = rotations(states.shape[-1], int(turn.max()) + 1)[turn]
    return torch.einsum("thd,hde->the", states, turns)


@functools.cache
def rotations(dim: int, count: int) -> Tensor:
    """Orthogonal matrices [count, dim, dim], the identity first; always the same ones."""
    generator = torch.Generator().manual_seed(dim)
    matrices = torch.linalg.qr(torch.randn(count, dim, dim, generator=generator)).Q
    matrices[0] = torch.eye(dim)
    return matrices


@dataclass(frozen=True)
class Configuration:
    """The options of `KVCacheAligner.configure`.

    Raises:
        BadInput: an unknown name, or an option that a learned map does not have.
    """

    head_mapping: str = "learned"
    merge_strategy: str = "weighted"
    split_strategy: str = "projection"
    preserve_group_query: bool = True

    def __post_init__(self) -> None:
        for field, known in (
            ("head_mapping", ("learned", *HEAD_MAPPINGS)),
            ("merge_strategy", tuple(MERGES)),
            ("split_strategy", tuple(SPLITS)),
        ):
            if getattr(self, field) not in known:
                raise BadInput(
                    f"unknown {field}", found=repr(getattr(self, field)), expected=", ".join(known)
                )
        how = (self.merge_strategy, self.split_strategy, self.preserve_group_query)
        if self.learned and how != ("weighted", "projection", True):
            raise BadInput(
                "a learned map merges, splits and keeps groups as it was fitted",
                found=str(self),
                expected="merge_strategy 'weighted', split_strategy 'projection', "
                "preserve_group_query True",
                remedy="leave them out, or head_mapping='uniform'",
            )

    @property
    def learned(self) -> bool:
        return self.head_mapping == "learned"


@dataclass(frozen=True, kw_only=True)
class TrainingFree(WMatrix):
    """A training-free map in the place of a W-Matrix; it has no file.

    `matched` [target layers] are the source layers of each target layer, as indices into the layers
    that are read; `shares` [Ht, Hs] per target layer the shares of its source heads.
    """

    configuration: Configuration
    matched: tuple[int, ...]
    shares: tuple[Tensor, ...]

    def map(
        self, source: Tensor | None, embeddings: Tensor, masked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As `WMatrix.map`, without the embeddings; masked states are zero."""
        manifest, how = self.manifest, self.configuration
        if source is None:
            source = torch.zeros(len(embeddings), manifest.source_width)
        elif masked is not None:
            source = source.masked_fill(masked[:, None], 0)
        read = tuple(manifest.source.layers[i] for i in manifest.layers)
        keys, values = split_states(manifest.source.model_copy(update={"layers": read}), source)
        mapped: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer, place, shares in zip(
            manifest.target.layers, self.matched, self.shares, strict=True
        ):
            each = MERGES[how.merge_strategy](shares, keys[place])
            for part, states in zip(mapped, (keys[place], values[place]), strict=True):
                moved = resized(each @ states, layer.head_dim)
                part.append(SPLITS[how.split_strategy](moved, turns(shares)))
        return mapped

    def head_mapping(self) -> list[HeadSources]:
        """The source heads of each target head."""
        return [
            HeadSources(
                Head(part, i, h),
                tuple(
                    (Head(part, self.manifest.layers[place], s), share)
                    for s, share in enumerate(shares[h].tolist())
                    if share
                ),
                tokens=0.0,
            )
            for part in ("key", "value")
            for i, (place, shares) in enumerate(zip(self.matched, self.shares, strict=True))
            for h in range(len(shares))
        ]

    def save(self, path: str | Path) -> None:
        raise BadInput(
            "a training-free mapping cannot be saved",
            found=str(self.configuration),
            expected="a learned map",
            remedy="fit one with `awareness fit`",
        )


def training_free(
    source: Geometry,
    target: Geometry,
    configuration: Configuration,
    sink: Sequence[int],
    sink_states: tuple[list[Tensor], list[Tensor]],
) -> TrainingFree:
    """The training-free map between two models.

    Args:
        sink: the target's fixed first ids; `sink_states` are its own keys and values [S, H, D].

    Raises:
        UnsupportedModel: heads that the configuration cannot map.
    """
    matched, shares = correspondence(source, target, configuration)
    layers = tuple(sorted(set(matched)))
    nothing = torch.empty(0)
    return TrainingFree(
        WMatrixManifest(
            source=source,
            target=target,
            layers=layers,
            rank=0,
            predecessors=0,
            sink=tuple(sink),
            anchors=Anchors(digest="", documents=0, tokens=0),
            fit=asdict(configuration),
            r2={},
            versions=versions(),
        ),
        mean=nothing,
        scale=nothing,
        encode=nothing,
        decode=nothing,
        bias=nothing,
        sink_keys=sink_states[0],
        sink_values=sink_states[1],
        configuration=configuration,
        matched=tuple(layers.index(i) for i in matched),
        shares=shares,
    )


def correspondence(
    source: Geometry, target: Geometry, configuration: Configuration
) -> tuple[list[int], tuple[Tensor, ...]]:
    """For each target layer its source layer, and the shares [Ht, Hs] of the source's heads.

    Raises:
        UnsupportedModel: heads that the configuration cannot map.
    """
    matched = by_depth(len(source.layers), len(target.layers))
    mapping, grouped = HEAD_MAPPINGS[configuration.head_mapping], configuration.preserve_group_query
    pairs = ((source.layers[i], layer) for i, layer in zip(matched, target.layers, strict=True))
    return matched, tuple(mapping(*pair, grouped) for pair in pairs)


def turns(shares: Tensor) -> Tensor:
    """For each target head the number of heads before it with the same source head, [Ht] int64."""
    main = shares.argmax(1)
    return (main[:, None] == main).tril(-1).sum(1)


def resized(states: Tensor, dim: int) -> Tensor:
    """States [T, H, dim]: dims cut off, or padded with zeros."""
    return torch.nn.functional.pad(states, (0, dim - states.shape[-1]))


class Figure(FrozenModel):
    """The measured retention of a training-free mapping between two models, in five arms."""

    source: str
    target: str
    weights: tuple[str, str]
    configuration: dict[str, str | bool]
    retention: Interval
    conditions: dict[str, dict[str, float]]
    context: int
    n: int
    texts: str
    measured: str
    hardware: str
    versions: dict[str, str]

    def __str__(self) -> str:
        i = self.retention
        return (
            f"retention {i.mean:.3f} ({i.ci_low:.3f} … {i.ci_high:.3f}) measured "
            f"{self.source} → {self.target}, {self.n} texts of {self.context} tokens"
        )


def figures() -> list[Figure]:
    """All recorded figures."""
    return [Figure.model_validate(row) for row in json.loads(FIGURES.read_text())]


def warn(configuration: Configuration, source: Geometry, target: Geometry) -> None:
    """Warn that a training-free mapping is in use, with its measured retention."""
    rows = [row for row in figures() if row.configuration == asdict(configuration)]
    here = [row for row in rows if row.weights == (source.weights, target.weights)]
    if here:
        known = str(here[-1])
    elif rows:
        known = f"not measured between these models; elsewhere: {rows[-1]}"
    else:
        known = "its retention was never measured"
    warnings.warn(
        f"head_mapping={configuration.head_mapping!r} is not learned from the models "
        f"{source.name} → {target.name}: {known}. A learned map: `awareness fit`",
        TrainingFreeWarning,
        stacklevel=3,
    )
