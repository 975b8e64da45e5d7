"""The kernels of `kernels/awareness_kernels`, under the product's name."""

from awareness_kernels import ops
from awareness_kernels.reference import (
    decode,
    encode,
    rms_normalise,
    rotate,
    unrotate,
    with_predecessors,
)

__all__ = ["decode", "encode", "ops", "rms_normalise", "rotate", "unrotate", "with_predecessors"]
