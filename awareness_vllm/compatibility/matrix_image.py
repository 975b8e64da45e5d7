"""The compatibility matrix as a picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awareness_vllm.compatibility.html.figures import is_prior, look, percent, spread
from awareness_vllm.compatibility.report import Cell, Matrix
from awareness_vllm.plotting import pyplot

COLOURS = dict(l0="#8fd3bd", l1="#c4e6cb", l2="#f7e6a1", l3="#f7cb93", l4="#f0aea1")
"""Of each level, as on the page in its light mode."""
EDGE = "#33424f"
LONGEST = 24
"""Letters of a name that have room."""


def matrix_image(matrix: Matrix, path: Path) -> None:
    """Draw the matrix into a file: measured cells solid and bold, priors hatched and in italics.

    Raises:
        BadInput: matplotlib is not installed.
    """
    plot = pyplot()
    rows, columns = len(matrix.sources), len(matrix.targets)
    size = (max(4.8, 2.4 + 1.2 * columns), 2.2 + 0.55 * rows)
    drawing, axes = plot.subplots(figsize=size, layout="constrained")
    for y, source in enumerate(matrix.sources):
        for x, target in enumerate(matrix.targets):
            if cell := matrix.cell(source, target):
                draw(axes, plot.Rectangle, cell, x, y)
    axes.set(xlim=(0, max(columns, 1)), ylim=(max(rows, 1), 0))
    # Names are anybody's text: a dollar sign in one begins no formula.
    axes.set_xticks(centres(columns), map(short, matrix.targets), parse_math=False, fontsize=9)
    axes.set_yticks(centres(rows), map(short, matrix.sources), parse_math=False, fontsize=9)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    plot.setp(axes.get_xticklabels(), rotation=30, ha="left", rotation_mode="anchor")
    axes.set_ylabel("source")
    axes.set_title("retention on each target", fontsize=10)
    axes.spines[:].set_visible(False)
    says = ("measured, with its 95 % interval", "prior: published, measured by nobody here")
    box = [plot.Rectangle((0, 0), 1, 1, **style(COLOURS["l1"], prior)) for prior in (False, True)]
    drawing.legend(box, says, loc="outside lower center", frameon=False, fontsize=8)
    drawing.savefig(path, dpi=150)
    plot.close(drawing)


def centres(count: int) -> list[float]:
    return [i + 0.5 for i in range(count)]


def short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def style(colour: str, prior: bool) -> dict[str, Any]:
    """How a cell is filled and framed."""
    if prior:
        return dict(facecolor="white", edgecolor=colour, hatch="////", linestyle="--")
    return dict(facecolor=colour, edgecolor=EDGE, linewidth=1.2)


def draw(axes: Any, rectangle: Any, cell: Cell, x: int, y: int) -> None:
    """One pair: its colour, its figure and its interval."""
    middle: dict[str, Any] = dict(ha="center", va="center")
    if cell.retention is None:
        axes.text(x + 0.5, y + 0.5, "not certified", fontsize=7, **middle)
        return
    prior, kept = is_prior(cell.basis), cell.retention
    place = ((x + 0.04, y + 0.06), 0.92, 0.88)
    axes.add_patch(rectangle(*place, **style(COLOURS[look(kept.mean)], prior)))
    if prior:  # a hatch has its frame's colour: the frame that can be seen is another
        axes.add_patch(rectangle(*place, fill=False, edgecolor=EDGE, linestyle="--", linewidth=0.8))
        middle |= dict(style="italic", bbox=dict(facecolor="white", edgecolor="none", pad=0.8))
    below = "prior" if prior else spread(kept.ci_low, kept.ci_high)
    bold = "normal" if prior else "bold"
    axes.text(x + 0.5, y + 0.34, percent(kept.mean, cell.basis), weight=bold, fontsize=9, **middle)
    axes.text(x + 0.5, y + 0.7, below, fontsize=7, **middle)
