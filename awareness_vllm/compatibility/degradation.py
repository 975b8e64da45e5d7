"""What a pair's loss was measured to come from, and the file beside a W-Matrix that keeps it."""

from __future__ import annotations

import datetime
import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from awareness_vllm.compatibility.priors import published_shares
from awareness_vllm.compatibility.report import REMAINDER, Share
from awareness_vllm.evaluate.bootstrap import mean, share
from awareness_vllm.files import atomic_write
from awareness_vllm.schema import FrozenModel
from awareness_vllm.wmatrix.certificate import Interval
from awareness_vllm.wmatrix.registry import WMatrixEntry

logger = logging.getLogger(__name__)

SUFFIX = ".degradation.json"


class Part(FrozenModel):
    """What was lost on some texts by one measure, in nats for each token scored.

    `loss` is that of the map with all constraints, a naive conversion: by how much it is worse
    than native reading. `recovered` is what lifting each of them takes away of it, a mean over all
    orders to lift them in (Shapley values), negative where it does harm; `remainder` is lost with
    all of them lifted. These six add up to `loss` exactly, and `shares` are theirs of it, signed;
    there are none where nothing was lost.

    `served` is what the W-Matrix itself loses, `uncalibrated` the regression that it began as;
    `alone` what that one loses more with a constraint than without it, all else as it is. `placed`
    is what is lost with true positions and all other constraints, `placed_shares` what these four
    and the remainder are of that.
    """

    n: int
    loss: Interval
    recovered: dict[str, Interval]
    remainder: Interval
    shares: tuple[Share, ...]
    served: Interval
    uncalibrated: Interval
    alone: dict[str, Interval]
    placed: Interval
    placed_shares: tuple[Share, ...]


class Measures(FrozenModel):
    """What was lost on some texts, by two measures.

    `nll` is of the tokens that came, as retention is; `kl` the divergence from what the target says
    after native reading: of all tokens that it might expect, so that less of it is chance.
    """

    nll: Part
    kl: Part


class Lost(FrozenModel):
    """What was lost at one length of context: on all texts, and by the folder they came from."""

    all: Measures
    kinds: dict[str, Measures]


class Degradation(FrozenModel):
    """What a W-Matrix's loss comes from, at each length of context in tokens.

    `wmatrix` is the digest of its file; `texts` that of the documents of which some were taken for
    each length, evenly. The maps were fitted on `anchor_tokens`, the limited ones to `rank`.
    """

    wmatrix: str
    contexts: dict[int, Lost]
    texts: str
    continuation: int
    anchor_tokens: int
    rank: int
    measured: datetime.date
    hardware: str
    versions: dict[str, str]

    def shares(self, tokens: int, measure: Literal["nll", "kl"] = "nll") -> tuple[Share, ...]:
        """The shares at the shortest measured length that `tokens` do not exceed, else at the
        longest."""
        lengths = sorted(self.contexts)
        length = next((length for length in lengths if length >= tokens), lengths[-1])
        found: Part = getattr(self.contexts[length].all, measure)
        return found.shares

    def save(self, wmatrix: Path) -> Path:
        """Write the file beside the W-Matrix, atomically; its path."""
        path = beside(wmatrix)
        with atomic_write(path) as draft:
            draft.write_text(self.model_dump_json(indent=1) + "\n")
        return path


def beside(wmatrix: Path) -> Path:
    """Where the measurement of a W-Matrix file is kept."""
    return wmatrix.with_name(wmatrix.name + SUFFIX)


def load_for(entry: WMatrixEntry) -> Degradation | None:
    """What was measured of a W-Matrix; None where nobody has, or only of another file.

    Certifying a map again makes another file of it, so its degradation is measured after that.
    """
    path = beside(entry.path)
    if not path.is_file():
        return None
    try:
        found = Degradation.model_validate_json(path.read_bytes())
    except OSError as error:
        logger.warning("%s is not used: %s", path.name, error)
        return None
    except ValidationError as error:
        logger.warning(
            "%s is not used: it is not of this version's form (%d fields); measure again with "
            "benchmarks/degradation.py",
            path.name,
            error.error_count(),
        )
        return None
    if found.wmatrix != entry.digest:
        logger.warning(
            "%s is not used: measured on the W-Matrix %s, this one is %s; measure it again with "
            "benchmarks/degradation.py",
            path.name,
            found.wmatrix[:12],
            entry.digest[:12],
        )
        return None
    return found


def part(losses: np.ndarray, served: np.ndarray) -> Part:
    """What the losses of some texts say: [32, n] of the maps in the order of `subset`, [n] of the
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
    """What each of K constraints takes away when it is lifted, a mean over all orders, [K, n].

    With the loss that is left when all are lifted these add up to the loss when none is.

    Args:
        losses: [2**K, n] by what is lifted, a bit for each constraint.
    """
    count = len(losses).bit_length() - 1
    found = np.zeros((count, losses.shape[1]))
    for lifted, bit in itertools.product(range(len(losses)), range(count)):
        if not lifted >> bit & 1:
            orders = count * math.comb(count - 1, lifted.bit_count())
            found[bit] += (losses[lifted] - losses[lifted | 1 << bit]) / orders
    return found


def shares(losses: np.ndarray, names: Sequence[str]) -> tuple[Share, ...]:
    """The shares of constraints and of the remainder in what is lost with all of them, [2**K, n] as
    for `shapley`, with intervals over documents, each beside the published one."""
    total = losses[0]
    if total.mean() <= 0:
        return ()
    nats = zip([*names, REMAINDER], [*shapley(losses), losses[-1]], strict=True)
    return tuple(
        Share(source=name, share=Interval(**share(found, total)), prior=SOURCES.get(name))
        for name, found in nats
    )


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
    """The constraints that a number from 0 to 31 says are lifted, a bit for each of SOURCES."""
    return frozenset(name for i, name in enumerate(SOURCES) if mask >> i & 1)


def mask(lifted: Lifted) -> int:
    """The number of a subset."""
    return sum(1 << i for i, name in enumerate(SOURCES) if name in lifted)
