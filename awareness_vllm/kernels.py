"""The operators of `kernels/awareness_kernels`, imported from here by the rest of the product."""

from awareness_kernels import ops
from awareness_kernels.reference import (
    LARGEST,
    decode,
    encode,
    largest,
    rms_normalise,
    rotate,
    unrotate,
    with_predecessors,
)

__all__ = [
    "LARGEST",
    "decode",
    "encode",
    "largest",
    "ops",
    "rms_normalise",
    "rotate",
    "unrotate",
    "with_predecessors",
]
