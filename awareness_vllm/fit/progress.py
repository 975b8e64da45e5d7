"""What a fit says of itself on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def phase(name: str, progress: bool) -> Iterator[None]:
    """Say on stderr how long a phase of the fit took."""
    started = time.perf_counter()
    yield
    say(f"{name}: {time.perf_counter() - started:.0f} s", progress)


def say(line: str, progress: bool) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
