"""Clocks: a run by the wall and by the device, and the machine's own floors beside it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from awareness_kernels import ops

from kernel_benchmark import device
from kernel_benchmark.cases import normal
from kernel_benchmark.device import synchronise
from kernel_benchmark.predicted import Peaks

WARM_UP = 2

Clock = Callable[[Callable[[], object], int], dict[str, float]]


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


def launcher(name: str) -> Callable[..., Any]:
    """An operator's launcher on CUDA, without the checks of its arguments."""
    launch: Callable[..., Any] = getattr(importlib.import_module(ops.KERNELS[name]), name)
    return launch


def against_floors(
    shape: tuple[int, int, int], moved: int, median: float, clock: Clock, repeats: int
) -> dict[str, float]:
    """The machine's own milliseconds for the work, a product of that shape and moving the bytes;
    and the larger one's fraction of what the operation took."""
    rows, inner, outer = shape
    product = 0.0
    if outer:
        x, w = normal(rows, inner), normal(inner, outer)
        product = clock(lambda: x @ w, repeats)["median"]
        del x, w
    # Half of the bytes are read, half are written.
    a = torch.empty(moved // 2, dtype=torch.uint8, device=device.DEVICE)
    b = torch.empty_like(a)
    copy = clock(lambda: b.copy_(a), repeats)["median"]
    return {"product_ms": product, "copy_ms": copy, "of_floor": max(product, copy) / median}


def peaks(assumed: Peaks, repeats: int) -> Peaks:
    """This device's rates: a copy of a gigabyte, and a product that fills every tile."""
    size, side = 2**29, 8192
    found = against_floors((side, side, side), 2 * size, 1.0, device_timed, repeats)
    properties = torch.cuda.get_device_properties(0)
    return replace(
        assumed,
        name=properties.name,
        copy=2e3 * size / found["copy_ms"],
        product=2e3 * side**3 / found["product_ms"],
        multiprocessors=properties.multi_processor_count,
        sheet=False,
    )
