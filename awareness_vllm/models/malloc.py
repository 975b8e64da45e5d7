"""The C allocator's treatment of freed memory."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel.

    By default every tensor over 32 MB is mapped anew and its pages are zeroed one fault at a time:
    a third of the time of a calibration step (docs/performance-log.md). Without glibc this does
    nothing. Not for a server, whose allocator is not ours to set.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
