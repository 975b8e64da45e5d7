"""The published sources of degradation by name, each with its published share."""

from __future__ import annotations

from awareness_vllm.compatibility.priors import published_shares

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
