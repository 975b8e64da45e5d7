"""Verdicts: which rows are right and reach their bars, in lines and in a plot."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from plotting import pyplot

from kernel_benchmark.cases import LARGE, PAGES, PAIRS
from kernel_benchmark.rows import Row

RATIO_BARS = {"eager_ratio": 3.0, "compiled_ratio": 1.5}
FLOOR_BARS = {"encode_states": 0.7, "decode_paged": 0.7, "rotate_paged": 0.8}
RIGHT = 1e-2
"""The greatest relative difference from the reference that rounding to bfloat16 explains."""
BARS_FROM = 4096
"""Fractions of the floor are promised from here on, and for the two larger pairs."""

Document = dict[str, Any]


def promised(pair: str, tokens: int) -> bool:
    """Whether a bar speaks of the fraction of the floor."""
    return pair in LARGE and tokens >= BARS_FROM


def verdict(row: Row) -> str:
    """Whether a row is right and reaches its bars, and its numbers beside them."""
    name = f"{row['pair']}, {row['tokens']} tokens, {row['operation']}"
    if "skipped" in row:
        return f"skipped {name}: {row['skipped']}"
    bars = dict(RATIO_BARS)
    if promised(row["pair"], row["tokens"]):
        bars["of_floor"] = FLOOR_BARS[row["operation"]]
    known = [row[column] for column in (*bars, "difference")]
    # What is not a number is no small difference.
    if row["difference"] is not None and not row["difference"] <= RIGHT:
        word = "wrong"
    elif any(row[column] is not None and row[column] < bar for column, bar in bars.items()):
        word = "short"
    else:
        word = "unknown" if None in known else "reached"
    said = [f"{column} {told(row, column)} ({bar})" for column, bar in bars.items()]
    said += [f"{column} {told(row, column)}" for column in ("device_of_floor", "difference")]
    return f"{word} {name}: {', '.join(said)}"


def told(row: Row, column: str) -> str:
    """A number, or why there is none."""
    return row["reasons"][column] if row[column] is None else f"{row[column]:.3g}"


def summary(document: Document) -> list[str]:
    """The bars are a GPU's: row by row, and how many of which verdict."""
    if not document["device"]:
        return ["no CUDA device: the bars are not judged"]
    lines = [verdict(row) for row in document["rows"]]
    counts = collections.Counter(line.split()[0] for line in lines)
    return [*lines, ", ".join(f"{word} {count}" for word, count in counts.items())]


def plot(document: Document, path: Path) -> None:
    """The fraction of the floor and both ratios against tokens, a column for each operation."""

    labels = {
        "of_floor": "fraction of the larger floor",
        "eager_ratio": "times faster than eager torch",
        "compiled_ratio": "times faster than torch.compile",
    }
    figure, grid = pyplot().subplots(
        len(labels), len(PAGES), figsize=(12, 9), sharex=True, layout="constrained"
    )
    for (column, label), line in zip(labels.items(), grid, strict=True):
        line[0].set_ylabel(label)
        for operation, axes in zip(PAGES, line, strict=True):
            bar = RATIO_BARS.get(column, FLOOR_BARS[operation])
            axes.axhline(bar, color="grey", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            draw(axes, document["rows"], operation, column)
            axes.set_ylim(bottom=0)
    for operation, axes, last in zip(PAGES, grid[0], grid[-1], strict=True):
        axes.set_title(operation)
        last.set_xlabel("tokens")
    if all(found := grid[0, 0].get_legend_handles_labels()):
        figure.legend(*found, loc="outside lower center", ncols=len(PAIRS))
    versions = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "triton"))
    figure.suptitle(f"{document['device'] or document['hardware']}, {versions}")
    figure.savefig(path, dpi=120)


def draw(axes: Any, rows: list[Row], operation: str, column: str) -> None:
    """A line for each pair; beside the floor's, dashed, the kernel alone."""
    for i, pair in enumerate(PAIRS):
        for name, mark in ((column, "o-"), (f"device_{column}", "x--")):
            points = sorted(
                (row["tokens"], row[name])
                for row in rows
                if (row["pair"], row["operation"]) == (pair, operation)
                and row.get(name) is not None
            )
            if points:
                label = pair if name == column else f"{pair}, the kernel alone"
                axes.plot(*zip(*points, strict=True), mark, color=f"C{i}", label=label)
