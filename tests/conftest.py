"""Without a GPU the Triton kernels run in Triton's interpreter.

Triton decides that when its functions are defined, its own library's too: so here, before anything
else can import it, and with the variable taken back for the servers that tests start.
"""

from __future__ import annotations

import pytest
import torch


def _interpret() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon
        from awareness_kernels import decode, encode, rotate

        assert triton.experimental.gluon
        assert all((decode, encode, rotate))


if not torch.cuda.is_available():
    _interpret()
