"""A W-Matrix's head mapping as a picture; needs matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from awareness_vllm.plotting import pyplot
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.heads import Head, HeadSources, head_mapping_summary, heads

LABELS = 40
"""No more labels on an axis than can be read."""


@dataclass(frozen=True)
class HeadShares:
    """The share of each source head (across) in each target head (down). `shares` is
    [target heads, source heads]; a row's rest to 1 is the target's own tokens'."""

    source: str
    target: str
    across: tuple[Head, ...]
    down: tuple[Head, ...]
    shares: np.ndarray


def head_shares(wmatrix: WMatrix) -> HeadShares:
    """Which source heads a map listens to, for every target head."""
    manifest = wmatrix.manifest
    rows = head_mapping_summary(wmatrix, top=2**31)
    across = [head for head, _ in heads(manifest.source, manifest.layers)]
    return HeadShares(
        source=manifest.source.name,
        target=manifest.target.name,
        across=tuple(across),
        down=tuple(row.target for row in rows),
        shares=shares(rows, across),
    )


def heat_map(wmatrix: WMatrix, path: Path) -> None:
    """Draw the share of each source head (across) in each target head (down) into a file.

    Raises:
        BadInput: matplotlib is not installed.
    """
    plot, found = pyplot(), head_shares(wmatrix)
    figure, axes = plot.subplots(figsize=(9, 7), layout="constrained")
    image = axes.imshow(found.shares, aspect="auto", cmap="viridis", vmin=0)
    for names, axis in ((found.across, axes.xaxis), (found.down, axes.yaxis)):
        ticks = range(0, len(names), -(-len(names) // LABELS))
        axis.set_ticks(ticks, [str(names[i]) for i in ticks], fontsize=6)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel(f"{found.source} (source)")
    axes.set_ylabel(f"{found.target} (target)")
    axes.set_title("share of the map's weight; the rest is the target's own tokens'", fontsize=9)
    figure.colorbar(image)
    figure.savefig(path, dpi=150)
    plot.close(figure)


def shares(rows: list[HeadSources], across: list[Head]) -> np.ndarray:
    """[target heads, source heads]."""
    place = {head: i for i, head in enumerate(across)}
    found = np.zeros((len(rows), len(across)))
    for i, row in enumerate(rows):
        for head, share in row.shares:
            found[i, place[head]] = share
    return found
