"""The kernels fit the cards that they are for: compiled for each without a GPU.

`compile_kernels.py` says what Triton's compiler and ptxas make of each kernel. What is spilled lies
on the stack, so without one nothing is. Widths of loads and stores show whether the hints on
addresses and strides arrive: without them a kernel is right, and several times slower.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from awareness_kernels.launch import Head

pytestmark = [pytest.mark.unit, pytest.mark.slow]

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program may have, in KiB, by compute capability."""
HOT = ("64", "128", "256")
"""The head dims that models have, whose kernels must be as fast as memory allows."""
RESIDENT = 512
"""Threads of a multiprocessor, at least, that its 65,536 registers must suffice for: memory's delay
is hidden by what they have on its way (docs/performance-log.md)."""


@functools.cache
def kernels(architecture: int) -> list[dict[str, Any]]:
    """Every kernel, compiled for an architecture; by a process that interprets none."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, str(script), str(architecture)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_fits_the_card(architecture: int) -> None:
    found = kernels(architecture)
    assert len(found) > 36
    assert [k["name"] for k in found if k["shared"] > 1024 * SHARED[architecture]] == []
    assert [k["name"] for k in found if k["stack"]] == []
    assert [k["name"] for k in found if k["name"].endswith("fp8e5")] != []
    e4m3 = [k["name"] for k in found if k["name"].endswith("fp8e4nv")]
    assert bool(e4m3) == (architecture >= 89)


@pytest.mark.parametrize("architecture", SHARED)
def test_models_heads_are_read_and_written_in_vectors(architecture: int) -> None:
    """No number of a state, a feature or an output is read or written by itself: what remains
    beside vectors are tables, indices and scales, of 8, 4 and 1 bytes."""
    hot = [
        k
        for k in kernels(architecture)
        if k["name"].startswith("pack_embeddings") or k["name"].split(", ")[1] in HOT
    ]
    assert len(hot) > 6 * len(HOT)
    for kernel in hot:
        name, fp8 = kernel["name"], "fp8" in kernel["name"]
        assert "2" not in kernel["loads"], name
        assert kernel["loads"]["8" if fp8 else "16"] >= 4, name
        # Pages of one-byte numbers are written in halves of a vector.
        written = "8" if fp8 and not name.startswith("pack") else "16"
        assert kernel["stores"].keys() == {written}, name
        assert kernel["registers"] * RESIDENT <= 65_536, name


@pytest.mark.parametrize("dims", [64, 128, 256])
def test_the_configurations_are_those_that_are_launched(dims: int) -> None:
    """A thread holds as much of any head."""
    for rotated, tile in ((0, 4096), (dims // 4, 2048), (dims // 2, 4096)):
        head = Head(dims, rotated, False, 8, True)
        assert head.rows * head.dims == tile
        assert head.constants["PAIRS"] == max(1, rotated)
