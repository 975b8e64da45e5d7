"""The page's drawings: inline SVG and plain boxes; colours are the style sheet's classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from awareness_vllm.compatibility.html.figures import is_prior, look
from awareness_vllm.compatibility.html.markup import Html, el
from awareness_vllm.compatibility.report import LEVELS, Basis, Curve, Share
from awareness_vllm.wmatrix.certificate import Interval

if TYPE_CHECKING:
    from awareness_vllm.wmatrix.heads import Head
    from awareness_vllm.wmatrix.heat_map import HeadShares

WIDTH, LEFT, RIGHT, TOP = 360.0, 52.0, 10.0, 10.0
PLOT = 190.0
"""Height of what is drawn between the axes, in the drawing's own units."""
GAP = 42.0
"""Labels on an axis that are nearer to each other cannot be read."""
COLOURS = 7
"""So many series have a colour of their own (`.c0` … in the style sheet)."""
HEADS = 128
"""More heads than that are taken together layer by layer: they would be smaller than a dot."""
SHADES = 8


def svg(name: str, height: float, *children: str) -> Html:
    """A drawing, with a name for those who do not see it."""
    return el("svg", *children, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=name)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: float, y: float, says: str, anchor: str = "middle") -> Html:
    return el("text", says, x=x, y=y, text_anchor=anchor)


def curves(found: Sequence[Curve]) -> Html:
    """Retention by tokens of context: for each tail a line in the band of its interval."""
    contexts = sorted({context for curve in found for context in curve.contexts})
    kept = [interval for curve in found for interval in curve.retention]
    low = math.floor(10 * min(i.ci_low for i in kept)) / 10
    high = max(1.0, math.ceil(20 * max(i.ci_high for i in kept)) / 20)
    span = math.log(contexts[-1] / contexts[0])

    def x(context: int) -> float:
        place = math.log(context / contexts[0]) / span if span else 0.5
        return LEFT + GAP / 2 + (WIDTH - LEFT - RIGHT - GAP) * place

    def y(share: float) -> float:
        return TOP + PLOT * (high - share) / (high - low)

    parts = [*grid(low, high, y), *context_axis(contexts, x)]
    alone: list[int] = []
    for i, curve in enumerate(found):
        # Whiskers at the same context stand beside each other.
        shift = 10 * alone.count(curve.contexts[0]) if len(curve.contexts) == 1 else 0
        alone += curve.contexts if len(curve.contexts) == 1 else ()
        points = [
            (x(context) + shift, y(kept.mean), y(kept.ci_low), y(kept.ci_high))
            for context, kept in zip(curve.contexts, curve.retention, strict=True)
        ]
        parts.append(el("g", *strokes(points), class_=f"c{i % COLOURS}"))
    return svg("Retention by tokens of context", TOP + PLOT + 42, *parts)


def grid(low: float, high: float, y: Callable[[float], float]) -> Iterator[Html]:
    """The axis of retention; 1 is as good as reading the text."""
    twentieths = 1 if high - low <= 0.3 else 2 if high - low <= 0.8 else 5
    for i in range(math.ceil(20 * low), math.floor(20 * high) + 1):
        if i % twentieths == 0:
            yield line(LEFT, y(i / 20), WIDTH - RIGHT, y(i / 20), "native" if i == 20 else "grid")
            yield text(LEFT - 6, y(i / 20) + 4, f"{5 * i} %", "end")


def context_axis(contexts: Sequence[int], x: Callable[[int], float]) -> Iterator[Html]:
    last = -math.inf
    for context in contexts:
        if x(context) - last >= GAP:
            last = x(context)
            yield text(last, TOP + PLOT + 18, f"{context:,}")
    yield text((LEFT + WIDTH - RIGHT) / 2, TOP + PLOT + 36, "tokens of context")


def strokes(points: Sequence[tuple[float, float, float, float]]) -> Iterator[Html]:
    """One curve: the band of its interval (a whisker where there is one point), line and dots."""
    if len(points) == 1:
        at, _, low, high = points[0]
        yield line(at, low, at, high, "curve")
    else:
        upper, lower = [(p[0], p[3]) for p in points], [(p[0], p[2]) for p in reversed(points)]
        yield el("polygon", points=pairs(upper + lower), class_="band")
        yield el("polyline", points=pairs([p[:2] for p in points]), class_="curve")
    for at, mean, _, _ in points:
        yield el("circle", cx=at, cy=mean, r=3.5)


def pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def stroke_mark(i: int) -> Html:
    """A curve's mark in the legend."""
    drawn = el("g", line(0, 6, 30, 6, "curve"), el("circle", cx=15, cy=6, r=3.5))
    inner = el("g", drawn, class_=f"c{i % COLOURS}")
    return el("svg", inner, viewBox="0 0 30 12", class_="mark", aria_hidden="true")


def heat_map(found: HeadShares) -> Html:
    """The share of each source head (across) in each target head (down), stronger for more."""
    (across, of_column), (down, of_row) = grouped(found.across), grouped(found.down)
    shares = (of_row / of_row.sum(0)).T @ found.shares @ of_column
    levels = np.rint(SHADES * shares / (shares.max() or 1)).astype(int)
    width, height = WIDTH - LEFT - RIGHT, 1.3 * PLOT
    wide, tall = width / len(across), height / len(down)
    place = f"translate({LEFT:g} {TOP:g}) scale({wide:.5g} {tall:.5g})"
    shades = [el("path", d=runs(levels == n), class_=f"h{n}") for n in range(1, SHADES + 1)]
    return svg(
        f"Share of each head of {found.source} in each head of {found.target}",
        TOP + height + 22,
        el("rect", x=LEFT, y=TOP, width=width, height=height, class_="h0"),
        el("g", *shades, transform=place),
        *(text(LEFT + (i + 0.5) * wide, TOP + height + 16, across[i]) for i in spaced(across, 6)),
        *(text(LEFT - 5, TOP + (i + 0.5) * tall + 4, down[i], "end") for i in spaced(down, 14)),
    )


def grouped(heads: Sequence[Head]) -> tuple[list[str], np.ndarray]:
    """Labels, and which head belongs to which of them, [heads, labels]."""
    single = len(heads) <= HEADS
    names = [f"{h.part[0].upper()}{h.layer}" + (f".{h.head}" if single else "") for h in heads]
    labels = list(dict.fromkeys(names))
    return labels, np.array([[name == label for label in labels] for name in names], float)


def spaced(labels: Sequence[str], most: int) -> range:
    return range(0, len(labels), -(-len(labels) // most))


def runs(cells: np.ndarray) -> str:
    """A path over the cells that are true, [rows, columns], those side by side as one."""
    path = []
    for y, row in enumerate(np.pad(cells.astype(int), ((0, 0), (1, 1)))):
        begins, ends = (np.flatnonzero(np.diff(row) == sign) for sign in (1, -1))
        path += [f"M{a} {y}h{b - a}v1h-{b - a}z" for a, b in zip(begins, ends, strict=True)]
    return "".join(path)


def scale(kept: Interval, basis: Basis | None, base: float) -> Html:
    """Retention on the published levels, from `base` to 1, with its interval."""

    def place(share: float) -> float:
        return 100 * min(max((share - base) / (1 - base), 0.0), 1.0)

    def box(low: float, high: float, class_: str) -> Html:
        left, right = place(low), place(high)
        return el("i", style=f"left:{left:.2f}%;width:{right - left:.2f}%", class_=class_)

    tops = [1.0, *(least for least, _, _ in LEVELS)]
    zones = [
        box(low, high, look((max(low, base) + high) / 2))
        for high, low in itertools.pairwise(tops)
        if high > base
    ]
    mark = el("b", style=f"left:{place(kept.mean):.2f}%")
    inner = (*zones, box(kept.ci_low, kept.ci_high, "whisker"), mark)
    return el(
        "div", *inner, class_="scale" + (" prior" if is_prior(basis) else ""), aria_hidden="true"
    )


def base_of(*kept: Interval) -> float:
    """Where a scale begins that has room for these."""
    return max(0.0, min(0.7, math.floor(10 * min(i.ci_low for i in kept)) / 10))


def bar(share: float) -> Html:
    """A share of the longest."""
    inner = el("i", style=f"width:{100 * share:.2f}%")
    return el("div", inner, class_="bar", aria_hidden="true")


def signed(share: Share, low: float, high: float) -> Html:
    """A share between `low` and `high`, from nothing to the right, or to the left where it is
    below: with its interval, and a mark where the published one would be."""

    def box(begin: float, end: float, class_: str) -> Html:
        left, right = (100 * (min(max(x, low), high) - low) / (high - low) for x in (begin, end))
        return el("i", style=f"left:{left:.2f}%;width:{right - left:.2f}%", class_=class_)

    kept = share.share
    boxes = [
        box(min(kept.mean, 0.0), max(kept.mean, 0.0), "below" if kept.mean < 0 else "above"),
        box(kept.ci_low, kept.ci_high, "whisker"),
        box(0.0, 0.0, "zero"),
    ]
    if share.prior is not None:
        boxes.append(box(share.prior, share.prior, "mark"))
    return el("div", *boxes, class_="signed", aria_hidden="true")
