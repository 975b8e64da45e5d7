"""What all tests share: how hypothesis draws, and where Triton's kernels run.

Without a GPU they run in Triton's interpreter. Triton decides that when its functions are defined,
its own library's too: so here, before anything else imports it, and with the variable taken back
for the servers that tests start. pytest-xdist's controller runs no test and need not wait for it.
"""

from __future__ import annotations

import gc
import sys

import pytest
from hypothesis import HealthCheck, settings

# A shared machine's seconds say nothing about the code: the first text that is drawn can take two.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

# What is imported stays: the garbage collector would look through all of it, torch's and vLLM's
# a million objects, in every full collection, a seventh of the unit tests' time. And the default of
# 700 new objects has it look 10,000 times, a fifteenth.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "no":
        _interpret()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or vLLM's libraries report what they see as leaks


def _interpret() -> None:
    import torch

    if torch.cuda.is_available():
        return
    assert "triton" not in sys.modules, "something imported Triton before it was told to interpret"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon
        from awareness_kernels import decode, encode, rotate

        assert triton.experimental.gluon
        assert all((decode, encode, rotate))
