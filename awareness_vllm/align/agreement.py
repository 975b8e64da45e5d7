"""The agreement of a memory's states with those that the target computes itself.

A package says of itself whose states it holds. The target reads the first tokens once, and the
memory's keys are compared with its own: states that have nothing to do with the text are found
out. States of another text, through a map that conditions on tokens, may pass; only a signature
tells who computed them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.wmatrix.manifest import WMatrixManifest

TOKENS = 64
"""First tokens of a memory that the target reads."""
MIN_TOKENS = 8
"""Tokens below which an agreement says nothing."""
COPY = 0.9
"""Least agreement of a copy: two engines' bfloat16 states agree to 0.99."""
MAPPED = 0.45
"""Least agreement of a mapped memory, as a share of what the map reaches on held-out texts. Genuine
states of any kind of text keep 0.6 of it, random ones at most 0.37 (docs/fidelity-log.md)."""


def agreement(states: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """The cosine of some states to the target's own, per layer [T, H, D], each without the target's
    mean over the tokens; the mean over the layers."""
    cosines = []
    for one, other in zip(states, own, strict=True):
        mean = other.float().mean(0)
        a, b = (state.float() - mean for state in (one, other))
        cosines.append((a * b).sum() / (a.norm() * b.norm()).clamp_min(torch.finfo().tiny))
    return float(torch.stack(cosines).mean())


def least_agreement(manifest: WMatrixManifest | None) -> float:
    """The agreement that genuine keys reach: of a copy, or through a map; 0 where its fit measured
    nothing."""
    if manifest is None:
        return COPY
    return MAPPED * math.sqrt(max(0.0, manifest.r2.get("keys", 0.0)))


def check_agreement(
    memory: str, keys: Sequence[Tensor], own: Sequence[Tensor], least: float
) -> None:
    """Check the keys of a memory's first tokens.

    Raises:
        PackageCorrupt: they are not those of its text.
    """
    if len(own[0]) < MIN_TOKENS or (found := agreement(keys, own)) >= least:
        return
    raise PackageCorrupt(
        f"the states of memory {memory} are not those of its text",
        found=f"an agreement of {found:.2f} with the model's own keys",
        expected=f"at least {least:.2f}",
        remedy="capture the memory again, or use one that a trusted key signed",
    )
