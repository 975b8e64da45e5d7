"""Coordinates of the page's drawings; the templates draw them, the style sheet colours them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from awareness_vllm.compatibility.html.figures import LOOKS
from awareness_vllm.compatibility.report import LEVELS, Curve, Share
from awareness_vllm.wmatrix.certificate import Interval

if TYPE_CHECKING:
    from awareness_vllm.wmatrix.heads import Head, HeadShares

WIDTH, LEFT, RIGHT, TOP = 360.0, 52.0, 350.0, 10.0
"""Of an SVG drawing, in its own units: its width, and the edges of the area between the axes."""
PLOT = 190.0
"""Height between the axes of curves."""
MAP = 247.0
"""Height of the heat map."""
GAP = 42.0
"""Labels on an axis that are nearer to each other cannot be read."""
COLOURS = 7
"""Number of series with a colour of their own (`.c0` … in the style sheet)."""
HEADS = 128
"""More heads than that are drawn by layer: each would be smaller than a dot."""
SHADES = 8

Box = tuple[float, float, str]
"""A stretch of a horizontal bar: left and width in per cent of the bar, and its class."""
Point = tuple[float, float, float, float]
"""A retention in a drawing: x, y, and the ys of the ends of its interval."""


def box(begin: float, end: float, class_: str, low: float, high: float) -> Box:
    """The part of `begin` … `end` that lies within a bar from `low` to `high`."""
    span = (high - low) or 1.0
    left, right = (100 * (min(max(x, low), high) - low) / span for x in (begin, end))
    return left, right - left, class_


def scale(retention: Interval, base: float) -> list[Box]:
    """The published levels from `base` to 1, and a retention with its interval on them."""
    tops = [1.0, *(least for least, _, _ in LEVELS)]
    zones = [
        (least, top, LOOKS[level])
        for top, (least, level, _) in zip(tops, LEVELS, strict=False)
        if top > base
    ]
    interval = (retention.ci_low, retention.ci_high, "whisker")
    mean = (retention.mean, retention.mean, "mean")
    return [box(*part, base, 1.0) for part in (*zones, interval, mean)]


def base_of(*retentions: Interval) -> float:
    """The lower end of a scale that has room for these intervals."""
    return max(0.0, min(0.7, math.floor(10 * min(r.ci_low for r in retentions)) / 10))


def signed(shares: Sequence[Share]) -> list[list[Box]]:
    """For each share a bar from zero to the right, or to the left where it is negative, with its
    interval, and a mark at the published share."""
    low = min(0.0, *(s.share.ci_low for s in shares))
    high = max(max(s.share.ci_high, s.prior or 0.0) for s in shares)
    bars = []
    for share, prior in ((s.share, s.prior) for s in shares):
        side = "below" if share.mean < 0 else "above"
        bar = [(min(share.mean, 0.0), max(share.mean, 0.0), side)]
        bar += [(share.ci_low, share.ci_high, "whisker"), (0.0, 0.0, "zero")]
        bar += [] if prior is None else [(prior, prior, "mark")]
        bars.append([box(*part, low, high) for part in bar])
    return bars


class Drawing(NamedTuple):
    """Curves of retention in an SVG drawing: `grid` has a y and its share in per cent, `ticks` an x
    and its tokens of context, `curves` the points of each curve."""

    grid: list[tuple[float, int]]
    ticks: list[tuple[float, int]]
    curves: list[list[Point]]


def drawing(curves: Sequence[Curve]) -> Drawing:
    """Retention by tokens of context, on a logarithmic axis."""
    contexts = sorted({context for curve in curves for context in curve.contexts})
    retentions = [retention for curve in curves for retention in curve.retention]
    low = math.floor(10 * min(r.ci_low for r in retentions)) / 10
    high = max(1.0, math.ceil(20 * max(r.ci_high for r in retentions)) / 20)
    span = math.log(contexts[-1] / contexts[0])

    def x(context: int) -> float:
        place = math.log(context / contexts[0]) / span if span else 0.5
        return LEFT + GAP / 2 + (RIGHT - LEFT - GAP) * place

    def y(share: float) -> float:
        return TOP + PLOT * (high - share) / (high - low)

    twentieths = 1 if high - low <= 0.3 else 2 if high - low <= 0.8 else 5
    steps = range(math.ceil(20 * low), math.floor(20 * high) + 1)
    ticks: list[tuple[float, int]] = []
    for context in contexts:
        if not ticks or x(context) - ticks[-1][0] >= GAP:
            ticks.append((x(context), context))
    points = []
    alone: list[tuple[int, ...]] = []
    for curve in curves:
        shift = 0
        if len(curve.contexts) == 1:  # whiskers at the same context stand beside each other
            shift = 10 * alone.count(curve.contexts)
            alone.append(curve.contexts)
        points.append(
            [
                (x(context) + shift, y(r.mean), y(r.ci_low), y(r.ci_high))
                for context, r in zip(curve.contexts, curve.retention, strict=True)
            ]
        )
    return Drawing([(y(i / 20), 5 * i) for i in steps if i % twentieths == 0], ticks, points)


class HeatMap(NamedTuple):
    """Cells of `wide` by `tall`: a path over those of each shade, and labels with their places."""

    wide: float
    tall: float
    shades: list[str]
    columns: list[tuple[float, str]]
    rows: list[tuple[float, str]]


def heat_map(heads: HeadShares) -> HeatMap:
    """The share of each source head (across) in each target head (down), stronger for more."""
    (across, of_column), (down, of_row) = grouped(heads.across), grouped(heads.down)
    shares = (of_row / of_row.sum(0)).T @ heads.shares @ of_column
    levels = np.rint(SHADES * shares / (shares.max() or 1)).astype(int)
    wide, tall = (RIGHT - LEFT) / len(across), MAP / len(down)
    return HeatMap(
        wide,
        tall,
        [runs(levels == shade) for shade in range(1, SHADES + 1)],
        [(LEFT + (i + 0.5) * wide, across[i]) for i in spaced(across, 6)],
        [(TOP + (i + 0.5) * tall, down[i]) for i in spaced(down, 14)],
    )


def grouped(heads: Sequence[Head]) -> tuple[list[str], np.ndarray]:
    """Labels, and which head has which of them, [heads, labels]."""
    single = len(heads) <= HEADS
    names = [f"{h.part[0].upper()}{h.layer}" + (f".{h.head}" if single else "") for h in heads]
    labels = list(dict.fromkeys(names))
    return labels, np.array([[name == label for label in labels] for name in names], float)


def spaced(labels: Sequence[str], most: int) -> range:
    """Indices of at most so many labels, evenly apart."""
    return range(0, len(labels), -(-len(labels) // most))


def runs(cells: np.ndarray) -> str:
    """An SVG path over the true ones of `cells` [rows, columns], neighbours in a row as one."""
    path = []
    for y, row in enumerate(np.pad(cells.astype(int), ((0, 0), (1, 1)))):
        begins, ends = (np.flatnonzero(np.diff(row) == sign) for sign in (1, -1))
        path += [f"M{a} {y}h{b - a}v1h-{b - a}z" for a, b in zip(begins, ends, strict=True)]
    return "".join(path)
