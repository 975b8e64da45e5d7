"""Time the fused kernels beside what the machine can do, and beside the same work in plain torch.

    python benchmarks/kernels.py --out docs/figures/kernels.json
    python benchmarks/kernels.py --from docs/figures/kernels.json --plot docs/figures/kernels.png

For each pair's geometry (from configs; random weights of the right shape and scale) and each number
of tokens: verify against the reference, then time. The floors are measured in the same run: a copy
of as many bytes, and a bfloat16 matrix product of as many operations. On a machine without CUDA the
reference itself is timed, the CPU path, a block at a time. A number that could not be had is null
and its row says why; rows are written as they are made, so that a run that is cut off keeps them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from awareness_kernels import ops, reference
from plotting import pyplot
from torch import Tensor

from awareness_vllm.provenance import hardware

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PAGE = 16
BLOCK = 512
"""Tokens at once on a CPU, as `align.aligner` takes them."""
WARM_UP = 2
NO_CUDA = "no CUDA: what is timed is the reference itself"
NO_TIME = "not reached in the time that was given"
PAGES = {"encode_states": (), "decode_paged": (9, 10), "rotate_paged": (0,)}
"""Each operation, and which of its arguments are pages: it writes into them."""
RATIO_BARS = {"eager_ratio": 3.0, "compiled_ratio": 1.5}
FLOOR_BARS = {"encode_states": 0.7, "decode_paged": 0.7, "rotate_paged": 0.8}
RIGHT = 1e-2
"""The greatest relative difference from the reference that rounding to bfloat16 explains."""
BARS_FROM = 4096
"""Fractions of the floor are promised from here on, and for the two larger pairs."""

Row = dict[str, Any]
Document = dict[str, Any]
Clock = Callable[[Callable[[], object], int], dict[str, float]]


@dataclass(frozen=True)
class Side:
    """One model's cache: layers that are read or written, KV heads, head dim, embedding width."""

    layers: int
    heads: int
    dims: int
    embed: int = 0

    @property
    def width(self) -> int:
        return 2 * self.layers * self.heads * self.dims


@dataclass(frozen=True)
class Pair:
    source: Side
    target: Side
    rank: int
    predecessors: int = 3

    @property
    def features(self) -> int:
        return self.source.width + (1 + self.predecessors) * self.target.embed


@dataclass(frozen=True)
class Case:
    """One operation and its arguments; `product` is the matrix product in it: rows, features and
    outputs."""

    operation: str
    arguments: list[Any]
    product: tuple[int, int, int]


LARGE = {
    "8B → 8B": Pair(Side(16, 8, 128), Side(32, 8, 128, 4096), 4096),
    "70B → 70B": Pair(Side(40, 8, 128), Side(80, 8, 128, 8192), 4096),
}
PAIRS = {"SmolLM2-135M → Gemma-3-270M": Pair(Side(15, 3, 64), Side(18, 1, 256, 640), 1024)} | LARGE


def normal(*size: int, scale: float = 1.0) -> Tensor:
    # In place: in float32 a map would take three times its own memory on the way.
    return torch.randn(size, dtype=torch.bfloat16, device=DEVICE).mul_(scale)


def encode_arguments(pair: Pair, tokens: int) -> list[Any]:
    """Random arguments of `encode_states` for a memory of so many tokens."""
    side = pair.source
    angles = torch.rand(tokens, side.dims // 2, device=DEVICE)
    states = [normal(tokens, side.heads, side.dims) for _ in range(2 * side.layers)]
    return [
        states[: side.layers],
        states[side.layers :],
        [angles.cos()] * side.layers,
        [angles.sin()] * side.layers,
        [0] * side.layers,
        torch.arange(tokens, device=DEVICE),
        torch.zeros(tokens, dtype=torch.bool, device=DEVICE),
        # A row of embedding for each token: bytes that are never read must not count.
        torch.arange(tokens + 1, device=DEVICE),
        normal(tokens + 1, pair.target.embed),
        torch.zeros(pair.features, device=DEVICE),
        torch.ones(pair.features, device=DEVICE),
        normal(pair.features, pair.rank, scale=pair.features**-0.5),
        pair.predecessors,
        1,
    ]


def decode_arguments(pair: Pair, latent: Tensor) -> list[Any]:
    """Random arguments of `decode_paged` for a latent [T, R] and a sink of one token."""
    side, rows = pair.target, len(latent) + 1
    pages = -(-rows // PAGE) + 1
    angles = torch.rand(rows, side.dims // 2, device=DEVICE)
    own = normal(1, side.heads, side.dims)
    slot_mapping = torch.randperm(pages * PAGE, device=DEVICE)[:rows]

    def empty() -> list[Tensor]:
        size = (pages, PAGE, side.heads, side.dims)
        return [torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(side.layers)]

    return [
        latent,
        normal(pair.rank, side.width, scale=pair.rank**-0.5),
        torch.zeros(side.width, device=DEVICE),
        torch.arange(rows, device=DEVICE),
        [angles.cos()] * side.layers,
        [angles.sin()] * side.layers,
        [0] * side.layers,
        [own] * side.layers,
        [own] * side.layers,
        empty(),
        empty(),
        [slot_mapping] * side.layers,
        torch.ones(2 * side.layers, device=DEVICE),
    ]


def rotate_arguments(written: list[Any]) -> list[Any]:
    """Arguments of `rotate_paged` for what `decode_paged` wrote."""
    turn = [[table[3].contiguous() for table in written[part]] for part in (4, 5)]
    return [written[9], written[11], *turn, written[6], written[12][: len(written[9])]]


def cases(pair: Pair, tokens: int) -> Iterator[Case]:
    """All three operations for a memory of so many tokens, one after the other."""
    encoded = encode_arguments(pair, tokens)
    with ops.tuning(DEVICE):
        latent = ops.encode_states(*encoded)
    yield Case("encode_states", encoded, (tokens, pair.features, pair.rank))
    encoded.clear()  # The case has the same list: its memory is wanted now.
    written = decode_arguments(pair, latent)
    with ops.tuning(DEVICE):
        ops.decode_paged(*written)
    yield Case("decode_paged", written, (tokens, pair.rank, pair.target.width))
    yield Case("rotate_paged", rotate_arguments(written), (tokens, 0, 0))


def timed(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of a run by the wall clock, the device waited for: what a caller waits. Checks
    and the table of addresses are the host's part of each launch and count."""
    times = []
    for _ in range(repeats + WARM_UP):
        synchronise()
        begin = time.perf_counter()
        run()
        synchronise()
        times.append(1e3 * (time.perf_counter() - begin))
    return spread(times)


def device_timed(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of a run between two CUDA events: the kernel's own part of the wall clock's
    time. Events count the device's idling too, so it sleeps till the host has queued the run."""
    times, cycles = [], 0
    for _ in range(repeats + WARM_UP):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronise()
        if cycles:
            torch.cuda._sleep(cycles)
        begin.record()
        queued = time.perf_counter()
        run()
        queued = time.perf_counter() - queued
        end.record()
        synchronise()
        times.append(begin.elapsed_time(end))
        # Twice as long as the host takes, at 2 GHz; never longer than 0.1 s.
        cycles = cycles or min(int(4e9 * queued) + 100_000, 200_000_000)
    return spread(times)


def spread(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of those after the warm-up."""
    wanted = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    found = torch.tensor(times[WARM_UP:], dtype=torch.float64).quantile(wanted)
    return dict(zip(("median", "p20", "p80"), found.tolist(), strict=True))


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


@contextlib.contextmanager
def launcher(name: str) -> Iterator[Callable[..., Any]]:
    """A kernel without the operator's checks, its table of addresses sent but once: for both, the
    host waits for the device."""
    module = importlib.import_module(ops.KERNELS[name])
    send = module.on_device
    sent: list[Tensor] = []

    def once(*arguments: Any) -> Tensor:
        if not sent:
            sent.append(send(*arguments))
        return sent[0]

    with mock.patch.object(module, "on_device", once):
        yield getattr(module, name)


def against_floors(
    case: Case, moved: int, median: float, clock: Clock, repeats: int
) -> dict[str, float]:
    """The machine's own milliseconds for the work, a product of that shape and moving the bytes;
    and the larger one's fraction of what the operation took."""
    rows, features, outputs = case.product
    product = 0.0
    if outputs:
        x, w = normal(rows, features), normal(features, outputs)
        product = clock(lambda: x @ w, repeats)["median"]
        del x, w
    # Half of the bytes are read, half are written.
    a = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    copy = clock(lambda: b.copy_(a), repeats)["median"]
    return {"product_ms": product, "copy_ms": copy, "of_floor": max(product, copy) / median}


def bytes_moved(case: Case) -> int:
    """What must be read and written: each input once; of the pages, only what is in slots."""
    paged, flat = PAGES[case.operation], []
    for i, part in enumerate(case.arguments):
        flat += [] if i in paged else part if isinstance(part, list) else [part]
    # Layers share their angles and slots.
    inputs = {x.data_ptr(): x.numel() * x.element_size() for x in flat if isinstance(x, Tensor)}
    # Re-rotation reads what it writes.
    times = 2 if case.operation == "rotate_paged" else 1
    return sum(inputs.values()) + 2 * times * numbers_written(case)


def numbers_written(case: Case) -> int:
    """How many an operation writes, each of two bytes."""
    if case.operation == "encode_states":
        return case.product[0] * case.product[2]
    slot_mapping = case.arguments[11 if case.operation == "decode_paged" else 1][0]
    pages = [page for part in PAGES[case.operation] for page in case.arguments[part]]
    return sum(len(slot_mapping) * page[0, 0].numel() for page in pages)


def flop(case: Case) -> int:
    """The product's; where there is none, the turns': six for each pair of numbers."""
    rows, features, outputs = case.product
    return 2 * rows * features * outputs or 3 * numbers_written(case)


def verified(case: Case) -> float:
    """The relative difference between the operator's result and the reference's."""
    ours, theirs = case.arguments, [*case.arguments]
    for part in PAGES[case.operation]:
        if case.operation == "decode_paged":
            for page in ours[part]:
                page.zero_()  # What an earlier run wrote proves nothing.
        theirs[part] = [page.clone() for page in ours[part]]
    off = size = 0.0
    for a, b in zip(result(ops, case, ours), result(reference, case, theirs), strict=True):
        off += (a.float() - b.float()).square().sum().item()
        size += b.float().square().sum().item()
    return (off / size) ** 0.5


def result(module: ModuleType, case: Case, arguments: list[Any]) -> list[Tensor]:
    """What an operation gives back, or else its pages."""
    found = getattr(module, case.operation)(*arguments)
    pages = [page for part in PAGES[case.operation] for page in arguments[part]]
    return pages if found is None else [found]


def free_memory() -> int:
    """Bytes that are free on the device; all that a machine without one has."""
    if not CUDA:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def needed(pair: Pair, tokens: int) -> dict[str, tuple[int, int]]:
    """Bytes for each operation: arguments beside a floor's operands, about as much again; and what
    the reference takes beside the arguments, with a copy of the pages to compare."""
    features, outputs = pair.features, pair.target.width

    def operands(inner: int, outer: int) -> int:
        return 2 * (tokens * inner + inner * outer + tokens * outer)

    encode, decode = operands(features, pair.rank), operands(pair.rank, outputs)
    return {
        # Features in float32 three and a half times: by layer, side by side, less the mean, scaled.
        "encode_states": (2 * encode, 14 * tokens * features),
        # The product, the same in float32 with the bias, and the copy.
        "decode_paged": (2 * decode, 8 * tokens * outputs),
        # The copy of the keys, and a layer in float32 a few times.
        "rotate_paged": (2 * decode, 2 * tokens * outputs),
    }


def lacking(bytes_: int) -> str:
    """Why so many bytes cannot be had; empty where they can."""
    free = free_memory()
    return f"needs {bytes_ / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if bytes_ > free else ""


def measure(row: Row, case: Case, why: str, repeats: int) -> None:
    """All columns but the compiled reference's, whose compiler takes most of the time: that comes
    when all else is there. `why` says that the reference's temporaries cannot be had."""
    operator, plain = (getattr(module, case.operation) for module in (ops, reference))
    moved = bytes_moved(case)
    row |= {"bytes": moved, "flop": flop(case), "reasons": {}}
    attempt(row, "difference", lambda: verified(case), why)
    row["ms"] = timed(lambda: operator(*case.arguments), repeats)
    row |= against_floors(case, moved, row["ms"]["median"], timed, repeats)
    if CUDA:
        with launcher(case.operation) as launch:
            row["device_ms"] = device_timed(lambda: launch(*case.arguments), repeats)
        found = against_floors(case, moved, row["device_ms"]["median"], device_timed, repeats)
        row |= {f"device_{column}": value for column, value in found.items()}
    else:
        for column in ("ms", "product_ms", "copy_ms", "of_floor"):
            leave(row, f"device_{column}", NO_CUDA)
    attempt(row, "eager_ratio", lambda: ratio(row, plain, case, repeats), why if CUDA else NO_CUDA)
    leave(row, "compiled_ratio", NO_TIME if CUDA else NO_CUDA)
    row.pop("skipped")


def measure_compiled(row: Row, case: Case, why: str, repeats: int) -> None:
    """The reference, compiled for exactly this size."""
    if "skipped" in row:
        return
    # Else the compiler gives up after a few sizes, and what runs is eager.
    torch.compiler.reset()
    plain = torch.compile(getattr(reference, case.operation), dynamic=False)
    # Any error of a compiler: it must not cost the rows after this one.
    attempt(row, "compiled_ratio", lambda: ratio(row, plain, case, repeats), why, RuntimeError)


def ratio(row: Row, plain: Callable[..., Any], case: Case, repeats: int) -> float:
    return timed(lambda: plain(*case.arguments), repeats)["median"] / row["ms"]["median"]


def attempt(
    row: Row,
    column: str,
    run: Callable[[], float],
    why: str,
    errors: type[Exception] = torch.cuda.OutOfMemoryError,
) -> None:
    """Fill a column in. With a `why` not to, or by an error, it is null and its reason is kept."""
    try:
        if not why:
            row["reasons"].pop(column, None)
            row[column] = run()
    except errors as error:
        why = reason(error)
    if why:
        leave(row, column, why)


def leave(row: Row, column: str, why: str) -> None:
    row[column] = None
    row["reasons"][column] = why


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def skip(rows: list[Row], why: str) -> None:
    """Say of each row why it is not measured, or why it has no compiled reference."""
    for row in rows:
        if "skipped" in row:
            row["skipped"] = why
        else:
            leave(row, "compiled_ratio", why)


def stage(rows: list[Row], fill: Callable[..., None], repeats: int, until: float) -> Iterator[Row]:
    """Fill in the rows of one pair and number of tokens, one by one, while there is time."""
    pair, tokens = PAIRS[rows[0]["pair"]], rows[0]["block"]
    needs = needed(pair, tokens)
    left = {row["operation"]: row for row in rows}
    try:
        why = lacking(max(own for own, _ in needs.values()))
        for case in () if why else cases(pair, tokens):
            row = left[case.operation]
            fill(row, case, lacking(needs[case.operation][1]), repeats)
            yield left.pop(case.operation)
            if time.monotonic() > until:
                return
    except torch.cuda.OutOfMemoryError as error:
        why = reason(error)
    skip([*left.values()], why)
    yield from left.values()


def run(args: argparse.Namespace) -> Document:
    """All rows, written to `args.out` whenever one is filled in."""
    # Those that the bars speak of come first: the time may be up before the others, and a kernel's
    # tile is chosen at the first size.
    jobs = sorted(itertools.product(args.pairs, args.tokens), key=lambda job: not promised(*job))
    document = machine() | {
        "measured": str(datetime.date.today()),
        "repeats": args.repeats,
        "pairs": {name: asdict(PAIRS[name]) for name in args.pairs},
        "rows": [
            {
                "pair": pair,
                "tokens": tokens,
                "block": tokens if CUDA else min(tokens, BLOCK),
                "operation": operation,
                "skipped": NO_TIME,
            }
            for pair, tokens in jobs
            for operation in PAGES
        ],
    }
    until = time.monotonic() + args.seconds
    torch.manual_seed(0)
    with torch.inference_mode():
        for fill in (measure, measure_compiled) if CUDA else (measure,):
            for i in range(0, len(document["rows"]), len(PAGES)):
                if time.monotonic() > until:
                    break
                rows = document["rows"][i : i + len(PAGES)]
                for row in stage(rows, fill, args.repeats, until):
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                    write(document, args.out)
    write(document, args.out)
    return document


def write(document: Document, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run may be killed while it writes.
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        part.replace(path)


def machine() -> Document:
    """Hardware and versions; nulls where there is no such thing."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None,
        "cuda": torch.version.cuda,
        "driver": None,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    device = None
    if CUDA:
        device = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB"
        # torch knows which CUDA the driver serves; the driver's own version is the kernel's to say.
        driver = [f"for CUDA {torch._C._cuda_getDriverVersion()}"]
        module = Path("/proc/driver/nvidia/version")
        if module.is_file():
            driver += module.read_text().splitlines()[:1]
        versions["driver"] = "; ".join(driver)
    return {"hardware": hardware(), "device": device, "versions": versions}


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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    sizes = [128, 512, 2048, 4096, 8192, 32768]
    parser.add_argument("--tokens", type=int, nargs="+", default=sizes)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row after these")
    parser.add_argument("--out", type=Path, help="JSON to write; the plot goes beside it")
    parser.add_argument("--from", type=Path, dest="data", help="JSON of an earlier run")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    document = json.loads(args.data.read_text()) if args.data else run(args)
    lines = summary(document)
    print("\n".join(lines))
    data = args.data or args.out
    path = args.plot or (data and data.with_suffix(".png"))
    try:
        if path:
            plot(document, path)
    except ModuleNotFoundError as error:
        why = f"no plot: {error}; it can be drawn elsewhere by --from JSON --plot {path}"
        if args.plot:
            sys.exit(why)
        print(why)
    if any(line.startswith("wrong") for line in lines):
        sys.exit("what the kernels computed is wrong")


if __name__ == "__main__":
    main()
