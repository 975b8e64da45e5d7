"""The kernels of `kernels/awareness_kernels`, under the product's name."""

from awareness_kernels.reference import (
    decode,
    encode,
    rms_normalise,
    rotate,
    unrotate,
    with_predecessors,
)

__all__ = ["decode", "encode", "rms_normalise", "rotate", "unrotate", "with_predecessors"]
