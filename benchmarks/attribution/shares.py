"""The shares of five constraints in a map's loss, from the losses of all 32 maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from awareness_vllm.compatibility.degradation import Part
from awareness_vllm.compatibility.priors import published_shares
from awareness_vllm.compatibility.report import REMAINDER, Share
from awareness_vllm.evaluate.bootstrap import mean, share
from awareness_vllm.wmatrix.certificate import Interval

RANK = "dimensional projection"
HEADS = "head redistribution"
POSITIONS = "positional re-encoding"
LAYERS = "layer depth mismatch"
NORMS = "activation mismatch"
_NAMES = (RANK, HEADS, POSITIONS, LAYERS, NORMS)
SOURCES = dict(zip(_NAMES, published_shares().values(), strict=True))
"""Each with its published share of the loss (a prior), the largest first."""

Lifted = frozenset[str]
"""The constraints that a map does not have."""
WMATRIX: Lifted = frozenset((HEADS, POSITIONS, LAYERS))
"""What a W-Matrix does not have: it is of limited rank, and its norms are its own."""


def subset(mask: int) -> Lifted:
    """The lifted constraints of a number from 0 to 31, a bit for each of SOURCES."""
    return frozenset(name for i, name in enumerate(SOURCES) if mask >> i & 1)


def mask(lifted: Lifted) -> int:
    """The number of a subset."""
    return sum(1 << i for i, name in enumerate(SOURCES) if name in lifted)


def part(losses: np.ndarray, served: np.ndarray) -> Part:
    """The record of some texts' losses: [32, n] of the maps in the order of `subset`, [n] of the
    W-Matrix itself."""
    own = mask(WMATRIX)
    placed = losses[[POSITIONS in subset(i) for i in range(len(losses))]]
    return Part(
        n=len(served),
        loss=Interval(**mean(losses[0])),
        recovered={
            name: Interval(**mean(nats))
            for name, nats in zip(SOURCES, shapley(losses), strict=True)
        },
        remainder=Interval(**mean(losses[-1])),
        shares=shares(losses, [*SOURCES]),
        served=Interval(**mean(served)),
        uncalibrated=Interval(**mean(losses[own])),
        alone={
            name: Interval(**mean(losses[own & ~bit] - losses[own | bit]))
            for name, bit in ((name, mask(frozenset({name}))) for name in SOURCES)
        },
        placed=Interval(**mean(placed[0])),
        placed_shares=shares(placed, [name for name in SOURCES if name != POSITIONS]),
    )


def shapley(losses: np.ndarray) -> np.ndarray:
    """Shapley values [K, n]: what each of K constraints takes off the loss when it is lifted, a
    mean over all orders.

    With the loss that is left when all are lifted these add up to the loss when none is.

    Args:
        losses: [2**K, n] by what is lifted, a bit for each constraint.
    """
    count = len(losses).bit_length() - 1
    values = np.zeros((count, losses.shape[1]))
    for lifted, bit in itertools.product(range(len(losses)), range(count)):
        if not lifted >> bit & 1:
            orders = count * math.comb(count - 1, lifted.bit_count())
            values[bit] += (losses[lifted] - losses[lifted | 1 << bit]) / orders
    return values


def shares(losses: np.ndarray, names: Sequence[str]) -> tuple[Share, ...]:
    """The shares of constraints and of the remainder in what is lost with all of them, [2**K, n] as
    for `shapley`, with intervals over documents, each beside the published one."""
    total = losses[0]
    if total.mean() <= 0:
        return ()
    nats = zip([*names, REMAINDER], [*shapley(losses), losses[-1]], strict=True)
    return tuple(
        Share(source=name, share=Interval(**share(loss, total)), prior=SOURCES.get(name))
        for name, loss in nats
    )
