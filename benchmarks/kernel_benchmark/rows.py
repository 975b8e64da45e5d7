"""A row's columns: verified, timed, and a reason for each number that could not be had."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from awareness_kernels import ops, reference
from torch import Tensor

from kernel_benchmark import device
from kernel_benchmark.cases import PAGES, Case, cases
from kernel_benchmark.clock import against_floors, device_timed, launcher, timed
from kernel_benchmark.predicted import Peaks, predict
from kernel_benchmark.shapes import KERNELS, PAIRS, bytes_moved, needed, product

NO_CUDA = "not measured: no CUDA device"
NO_TIME = "not measured: not reached in the time that was given"

Row = dict[str, Any]


def planned(pair: str, tokens: int, operation: str, peaks: Peaks) -> Row:
    """A row before it is measured: what is predicted of it, and why there is nothing else."""
    return {
        "pair": pair,
        "tokens": tokens,
        "operation": operation,
        "kernels": KERNELS[operation],
        "predicted": predict(PAIRS[pair], tokens, operation, peaks),
        "skipped": NO_TIME if device.CUDA else NO_CUDA,
    }


def measure(row: Row, case: Case, why: str, repeats: int) -> None:
    """All columns but the compiled reference's, whose compiler takes most of the time: that comes
    when all else is there. `why` says that the reference's temporaries cannot be had."""
    operator, plain = (getattr(module, case.operation) for module in (ops, reference))
    work = PAIRS[row["pair"]], row["tokens"], case.operation
    shape, moved = product(*work), bytes_moved(*work)
    row["reasons"] = {}
    attempt(row, "difference", lambda: verified(case), why)
    row["ms"] = timed(lambda: operator(*case.arguments), repeats)
    row |= against_floors(shape, moved, row["ms"]["median"], timed, repeats)
    launch = launcher(case.operation)
    row["device_ms"] = device_timed(lambda: launch(*case.arguments), repeats)
    found = against_floors(shape, moved, row["device_ms"]["median"], device_timed, repeats)
    row |= {f"device_{column}": value for column, value in found.items()}
    attempt(row, "eager_ratio", lambda: ratio(row, plain, case, repeats), why)
    leave(row, "compiled_ratio", NO_TIME)
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
    arguments = case.resident()
    return timed(lambda: plain(*arguments), repeats)["median"] / row["ms"]["median"]


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
    pair, tokens = PAIRS[rows[0]["pair"]], rows[0]["tokens"]
    needs = needed(pair, tokens)
    left = {row["operation"]: row for row in rows}
    try:
        why = device.lacking(max(own for own, _ in needs.values()))
        for case in () if why else cases(pair, tokens):
            row = left[case.operation]
            fill(row, case, device.lacking(needs[case.operation][1]), repeats)
            yield left.pop(case.operation)
            if time.monotonic() > until:
                return
    except torch.cuda.OutOfMemoryError as error:
        why = reason(error)
    skip([*left.values()], why)
    yield from left.values()


def verified(case: Case) -> float:
    """The relative difference between the operator's result and the reference's."""
    ours, theirs = case.arguments, case.resident()
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
