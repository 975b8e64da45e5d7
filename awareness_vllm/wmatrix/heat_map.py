"""A W-Matrix's head mapping as a picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from awareness_vllm.errors import BadInput
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.mapping import Head, HeadSources, head_mapping_summary, heads

LABELS = 40
"""No more labels on an axis than can be read."""


def heat_map(wmatrix: WMatrix, path: Path) -> None:
    """Draw the share of each source head (across) in each target head (down) into a file.

    Raises:
        BadInput: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput(
            "no plot without matplotlib",
            found=str(error),
            remedy="pip install 'awareness-vllm[bench]'",
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    manifest = wmatrix.manifest
    rows = head_mapping_summary(wmatrix, top=2**31)
    across = [head for head, _ in heads(manifest.source, manifest.layers)]
    figure, axes = pyplot.subplots(figsize=(9, 7), layout="constrained")
    image = axes.imshow(shares(rows, across), aspect="auto", cmap="viridis", vmin=0)
    for names, axis in ((across, axes.xaxis), ([row.target for row in rows], axes.yaxis)):
        ticks = range(0, len(names), -(-len(names) // LABELS))
        axis.set_ticks(ticks, [str(names[i]) for i in ticks], fontsize=6)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel(f"{manifest.source.name} (source)")
    axes.set_ylabel(f"{manifest.target.name} (target)")
    axes.set_title("share of the map's weight; the rest is the target's own tokens'", fontsize=9)
    figure.colorbar(image)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def shares(rows: list[HeadSources], across: list[Head]) -> np.ndarray:
    """[target heads, source heads]."""
    place = {head: i for i, head in enumerate(across)}
    found = np.zeros((len(rows), len(across)))
    for i, row in enumerate(rows):
        for head, share in row.shares:
            found[i, place[head]] = share
    return found
