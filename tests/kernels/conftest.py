"""The launchers under test."""

from __future__ import annotations

import pytest
from kernel_cases import Kernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The launchers; without a GPU, tests/conftest.py has their kernels interpreted."""
    from awareness_kernels import decode, encode, rotate

    return {
        "encode_states": encode.encode_states,
        "decode_paged": decode.decode_paged,
        "rotate_paged": rotate.rotate_paged,
    }
