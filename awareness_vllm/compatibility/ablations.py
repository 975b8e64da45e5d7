"""Where a map's loss comes from: a registered function for each published source of degradation.

Each gives the map the truth for its part, and nothing else; what the target's predictions win by it
is what that part costs, by itself. The parts overlap (keys of a layer are in two of them), so what
they win does not add up to the loss: it may be more, and what is left when all are given at once is
measured apart. A part may do harm, too: calibration fits the parts of a map to each other's errors,
and the truth for one of them alone does not fit the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.geometry import Geometry
from awareness_vllm.wmatrix.layers import columns
from awareness_vllm.wmatrix.mapping import heads

FIRST_BAND = 8
"""Tokens in the first band of positions; each further one is twice as wide as the one before."""


@dataclass(frozen=True)
class Aligned:
    """One text's target states, keys position-free, without the sink: as the map gives them,
    `mapped` [T, O], and the target's own, `truth` [T, O].

    `beyond_rank` [T, O] is what a map without a latent would add to the mapped states, `drift`
    [B, O] the error that bands of positions alone foretell, `unmatched` are the target's layers
    that have no source layer of their own.
    """

    geometry: Geometry
    mapped: Tensor
    truth: Tensor
    beyond_rank: Tensor
    drift: Tensor
    unmatched: tuple[int, ...]


Ablation = Callable[[Tensor, Aligned], Tensor]
"""States [T, O] to the same with the truth given for one part."""


@dataclass(frozen=True)
class Source:
    """A source of degradation: how it is measured, and its published share (a prior)."""

    ablate: Ablation
    prior: float


SOURCES: dict[str, Source] = {}
"""In the order in which they are given together: corrections first, whole truths after them."""


def source(name: str, prior: float) -> Callable[[Ablation], Ablation]:
    """Register an ablation under its source's published name."""

    def register(function: Ablation) -> Ablation:
        SOURCES[name] = Source(function, prior)
        return function

    return register


def together(states: Tensor, text: Aligned) -> Tensor:
    """All parts given at once."""
    for one in SOURCES.values():
        states = one.ablate(states, text)
    return states


@source("dimensional projection", prior=0.30)
def dimensions(states: Tensor, text: Aligned) -> Tensor:
    """The limit of the rank taken away: what the unreduced regression on the same features says
    outside of what the latent can express is added, what the map says within it stays. Learned from
    too few anchors that is noise: harm says that nothing is shown, not that rank costs nothing."""
    return states + text.beyond_rank


@source("positional re-encoding", prior=0.20)
def positions(states: Tensor, text: Aligned) -> Tensor:
    """The error taken off that hangs on where a token stands and on nothing else, learned from the
    other texts. Where turned keys go to turned keys about nothing is expected: positions are taken
    off and put on exactly."""
    return states + text.drift[bands(len(states))]


@source("activation mismatch", prior=0.10)
def norms(states: Tensor, text: Aligned) -> Tensor:
    """The target's own norm statistics given: each head's keys, and its values, scaled so that
    their mean norm over the text is that of the target's own."""
    scaled = states.clone()
    for _, part in heads(text.geometry, range(len(text.geometry.layers))):
        ours, theirs = (s[:, part].norm(dim=1).mean() for s in (states, text.truth))
        scaled[:, part] *= theirs / ours.clamp_min(1e-6)
    return scaled


@source("layer depth mismatch", prior=0.15)
def depth(states: Tensor, text: Aligned) -> Tensor:
    """The target's own states given in the layers that have no source layer of their own at their
    depth. With as many source layers read as the target has, that is none: nothing is lost."""
    given = states.clone()
    for layer in text.unmatched:
        part = columns(text.geometry, layer)
        given[:, part] = text.truth[:, part]
    return given


@source("head redistribution", prior=0.25)
def patterns(states: Tensor, text: Aligned) -> Tensor:
    """The target's own keys given, so that its heads attend natively; values stay mapped. An upper
    bound: patterns are distorted by whatever else spoils keys, too."""
    keys = text.geometry.key_width
    return torch.cat((text.truth[:, :keys], states[:, keys:]), dim=1)


def bands(count: int) -> Tensor:
    """The band of each of so many positions, [T] int64."""
    return (torch.arange(count) // FIRST_BAND + 1).float().log2().long()


def drifts(errors: Iterable[Tensor]) -> list[Tensor]:
    """For each text, what the bands of positions say of its error, [B, O] each, from the others.

    The other texts' mean error in a band, less their mean error in all: what is the same everywhere
    is no matter of positions. Of its own error a text learns nothing; alone it learns nothing at
    all.

    Args:
        errors: truth less mapped, [T, O] of each text.
    """
    found = [by_band(error) for error in errors]
    most = max(len(counts) for _, counts in found)
    sums = torch.stack([padded(s, most) for s, _ in found])
    counts = torch.stack([padded(c, most) for _, c in found])
    others, n = sums.sum(0) - sums, counts.sum(0) - counts
    overall = others.sum(1, keepdim=True) / n.sum(1, keepdim=True).clamp_min(1)
    return list(torch.where(n > 0, others / n.clamp_min(1) - overall, 0))


def by_band(error: Tensor) -> tuple[Tensor, Tensor]:
    """A text's error summed by band [B, O], and each band's tokens [B, 1]."""
    band = bands(len(error))
    one_hot = torch.nn.functional.one_hot(band).T.float()
    return one_hot @ error, one_hot.sum(1, keepdim=True)


def padded(rows: Tensor, count: int) -> Tensor:
    """Rows [B, …] with rows of zeros after them."""
    return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


def unmatched(read: Iterable[int], source_layers: int, target_layers: int) -> tuple[int, ...]:
    """The target's layers without a source layer of their own.

    Each target layer asks for the source layer that is read nearest to its relative depth; of those
    that ask for the same one, the nearest has it.

    Args:
        read: the source's layers that the map reads, of `source_layers`.
    """
    has: dict[int, tuple[float, int]] = {}
    for layer in range(target_layers):
        depth_of = layer / max(1, target_layers - 1)
        distance, nearest = min((abs(i / max(1, source_layers - 1) - depth_of), i) for i in read)
        has[nearest] = min(has.get(nearest, (2.0, 0)), (distance, layer))
    matched = {layer for _, layer in has.values()}
    return tuple(layer for layer in range(target_layers) if layer not in matched)
