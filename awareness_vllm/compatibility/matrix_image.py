"""The compatibility matrix as a picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awareness_vllm.compatibility.figures import is_prior, look, percent, spread
from awareness_vllm.compatibility.report import Cell, Matrix
from awareness_vllm.plotting import pyplot

COLOURS = dict(l0="#8fd3bd", l1="#c4e6cb", l2="#f7e6a1", l3="#f7cb93", l4="#f0aea1")
"""Of each level, as on the page in its light mode."""


def matrix_image(matrix: Matrix, path: Path) -> None:
    """Draw the matrix into a file: measured cells solid and bold, priors hatched and in italics.

    Raises:
        BadInput: matplotlib is not installed.
    """
    plot = pyplot()
    rows, columns = len(matrix.sources), len(matrix.targets)
    size = (2.4 + 1.35 * columns, 1.6 + 0.62 * rows)
    drawing, axes = plot.subplots(figsize=size, layout="constrained")
    for y, source in enumerate(matrix.sources):
        for x, target in enumerate(matrix.targets):
            if cell := matrix.cell(source, target):
                draw(axes, plot.Rectangle, cell, x, y)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    # Names are anybody's text: a dollar sign in one begins no formula.
    axes.set_xticks([x + 0.5 for x in range(columns)], matrix.targets, parse_math=False)
    axes.set_yticks([y + 0.5 for y in range(rows)], matrix.sources, parse_math=False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    plot.setp(axes.get_xticklabels(), rotation=30, ha="left", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    says = ("measured, with its 95 % interval", "prior: published, measured by nobody here")
    patches = [
        plot.Rectangle((0, 0), 1, 1, **style(COLOURS["l1"], prior)) for prior in (False, True)
    ]
    drawing.legend(patches, says, loc="outside lower center", frameon=False, fontsize=8)
    drawing.savefig(path, dpi=150)
    plot.close(drawing)


def style(colour: str, prior: bool) -> dict[str, Any]:
    """How a cell is filled and framed."""
    if prior:
        return dict(facecolor="white", edgecolor=colour, hatch="////", linestyle="--")
    return dict(facecolor=colour, edgecolor="#33424f", linewidth=1.2)


def draw(axes: Any, rectangle: Any, cell: Cell, x: int, y: int) -> None:
    """One pair: its colour, its figure and its interval."""
    middle = (x + 0.5, y + 0.5)
    if cell.retention is None:
        axes.annotate("not certified", middle, ha="center", va="center", fontsize=7)
        return
    prior, kept = is_prior(cell.basis), cell.retention
    filled = style(COLOURS[look(kept.mean)], prior)
    axes.add_patch(rectangle((x + 0.04, y + 0.06), 0.92, 0.88, **filled))
    ends = "prior" if prior else spread(kept.ci_low, kept.ci_high)
    axes.annotate(
        f"{percent(kept.mean, cell.basis)}\n{ends}",
        middle,
        ha="center",
        va="center",
        fontsize=8,
        fontstyle="italic" if prior else "normal",
        fontweight="normal" if prior else "bold",
        bbox=dict(facecolor="white", edgecolor="none", pad=1.5) if prior else None,
    )
