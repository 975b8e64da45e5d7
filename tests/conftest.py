"""What all tests share: how hypothesis draws, and where Triton's kernels run.

Without a GPU they run in Triton's interpreter. Triton decides that when its functions are defined,
its own library's too: so here, before anything else can import it, and with the variable taken back
for the servers that tests start.
"""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

# A shared machine's seconds say nothing about the code: the first text that is drawn can take two.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

# What is imported stays: the garbage collector would look through all of it, torch's and vLLM's
# a million objects, in every full collection, a seventh of the unit tests' time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or vLLM's libraries report what they see as leaks


def _interpret() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon
        from awareness_kernels import decode, encode, rotate

        assert triton.experimental.gluon
        assert all((decode, encode, rotate))


if not torch.cuda.is_available():
    _interpret()
