"""matplotlib, which draws pictures for files and is not needed for anything else."""

from __future__ import annotations

from typing import Any

from awareness_vllm.errors import BadInput


def pyplot() -> Any:
    """`matplotlib.pyplot` that draws without a screen.

    Raises:
        BadInput: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput(
            "no plot without matplotlib",
            found=str(error),
            remedy="pip install 'awareness-vllm[bench]'",
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
