"""Progress lines of a fit on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def phase(name: str, progress: bool) -> Iterator[None]:
    """Report how long the block, a phase of the fit, took."""
    started = time.perf_counter()
    yield
    say(f"{name}: {time.perf_counter() - started:.0f} s", progress)


def say(line: str, progress: bool) -> None:
    """Print a line on stderr, with `progress`."""
    if progress:
        print(line, file=sys.stderr, flush=True)
