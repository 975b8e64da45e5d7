"""Memory that glibc keeps, measured in a process of its own, since the setting lasts for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

FAULTS = """
import resource, sys
import torch
from awareness_vllm.models.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.empty(16 << 20).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in (15, 14, 13, 12):
    torch.empty(size << 20).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, what], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_freed_tensors_pages_serve_the_next_one() -> None:
    assert faults("default") > 10 * (faults("keep") + 1)
