"""Verdicts: which rows are right and reach their bars, in lines and in a plot."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from plotting import pyplot

from kernel_benchmark.rows import Row
from kernel_benchmark.shapes import KERNELS, LARGE, PAIRS

RATIO_BARS = {"eager_ratio": 4.0, "compiled_ratio": 2.0}
FLOOR_BARS = {"encode_states": 0.8, "decode_paged": 0.8, "rotate_paged": 0.9}
FLOOR = "device_of_floor"
"""The column that they speak of: a call queues its kernels and waits for none, so the host's part
of it goes on beside the kernels of the call before. `of_floor` is a call that is waited for."""
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
        bars[FLOOR] = FLOOR_BARS[row["operation"]]
    known = [row[column] for column in (*bars, "difference")]
    # What is not a number is no small difference.
    if row["difference"] is not None and not row["difference"] <= RIGHT:
        word = "wrong"
    elif any(row[column] is not None and row[column] < bar for column, bar in bars.items()):
        word = "short"
    else:
        word = "unknown" if None in known else "reached"
    said = [f"{column} {told(row, column)} ({bar})" for column, bar in bars.items()]
    said += [f"{column} {told(row, column)}" for column in ("of_floor", "difference")]
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


COLUMNS = {
    "ms": "ms",
    "of_floor": "of the larger floor",
    "eager_ratio": "× eager",
    "compiled_ratio": "× compiled",
}


def table(document: Document) -> list[str]:
    """The rows as a table in Markdown: what is predicted beside what was measured."""
    peaks = document["peaks"]
    kind = "assumed from the data sheet" if peaks["sheet"] else "measured"
    copy, product = peaks["copy"] / 1e12, peaks["product"] / 1e12
    head = ["pair", "tokens", "kernels", "floor, ms", *COLUMNS.values(), "**measured**"]
    lines = [
        f"Peaks of {peaks['name']}, {kind}: copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    order = list(PAIRS)
    for row in sorted(document["rows"], key=lambda r: (order.index(r["pair"]), r["tokens"])):
        found = row["predicted"]
        cells = [row["pair"], f"{row['tokens']:,}", row["kernels"]]
        cells += [f"{max(found['product_ms'], found['copy_ms']):.2f}"]
        cells += [f"{found[column]:.2f}" for column in COLUMNS]
        lines.append(f"| {' | '.join([*cells, measured(row)])} |")
    return lines


def measured(row: Row) -> str:
    """The measured column: the same numbers, or why there are none."""
    if "skipped" in row:
        return row["skipped"]
    columns = {FLOOR: "of floor", "eager_ratio": "× eager", "compiled_ratio": "× compiled"}
    parts = [f"{told(row, column)} {label}" for column, label in columns.items()]
    return f"{row['device_ms']['median']:.2f} ms, {', '.join(parts)}"


def plot(document: Document, path: Path) -> None:
    """The fraction of the floor and both ratios against tokens, a column for each operation."""

    labels = {
        "of_floor": "fraction of the larger floor",
        "eager_ratio": "times faster than eager torch",
        "compiled_ratio": "times faster than torch.compile",
    }
    figure, grid = pyplot().subplots(
        len(labels), len(KERNELS), figsize=(12, 9), sharex=True, layout="constrained"
    )
    for (column, label), line in zip(labels.items(), grid, strict=True):
        line[0].set_ylabel(label)
        for operation, axes in zip(KERNELS, line, strict=True):
            bar = RATIO_BARS.get(column, FLOOR_BARS[operation])
            axes.axhline(bar, color="grey", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            draw(axes, document["rows"], operation, column)
            axes.set_ylim(bottom=0)
    for operation, axes, last in zip(KERNELS, grid[0], grid[-1], strict=True):
        axes.set_title(operation)
        last.set_xlabel("tokens")
    if all(found := grid[0, 0].get_legend_handles_labels()):
        figure.legend(*found, loc="outside lower center", ncols=len(PAIRS))
    versions = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "triton"))
    figure.suptitle(f"{document['device'] or document['hardware']}, {versions}")
    figure.savefig(path, dpi=120)


def draw(axes: Any, rows: list[Row], operation: str, column: str) -> None:
    """For each pair a line; dashed, the kernel alone; dotted, what was predicted."""
    for i, pair in enumerate(PAIRS):
        own = [row for row in rows if (row["pair"], row["operation"]) == (pair, operation)]
        lines = {
            "": ("o-", [(row["tokens"], row.get(column)) for row in own]),
            ", the kernel alone": ("x--", [(r["tokens"], r.get(f"device_{column}")) for r in own]),
            ", predicted": (".:", [(row["tokens"], row["predicted"][column]) for row in own]),
        }
        for label, (mark, found) in lines.items():
            points = sorted(point for point in found if point[1] is not None)
            if points:
                axes.plot(*zip(*points, strict=True), mark, color=f"C{i}", label=pair + label)
