"""The operations as torch operators: Triton kernels and cuBLAS on CUDA, the reference elsewhere.

torch's dispatcher chooses by the arguments' device; which one serves is logged at the first call.
Indices may be on the host beside a device's tensors: the operator checks them there and sends them
itself. On CUDA no operator makes the host wait.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from awareness_kernels import checks, reference
from awareness_kernels.blocks import SCRATCH, block_rows

__all__ = ["SCRATCH", "block_rows", "decode_paged", "encode_states", "rotate_paged"]

logger = logging.getLogger(__name__)

KERNELS = {
    "encode_states": "awareness_kernels.encode",
    "decode_paged": "awareness_kernels.decode",
    "rotate_paged": "awareness_kernels.rotate",
}
"""Each operator's kernel module, imported at the first call on CUDA: a CPU needs no Triton."""
MUTATED = {"decode_paged": ("key_pages", "value_pages"), "rotate_paged": ("key_pages",)}


def register(name: str) -> CustomOpDef:
    """The operator `awareness::name`: the reference of that name, and its launcher for CUDA; either
    runs on arguments that `checks` has passed."""
    check = getattr(checks, name)

    def plain(*args: Any) -> Any:
        check(*args)
        _log(name, "plain torch")
        return getattr(reference, name)(*args)

    def kernel(*args: Any) -> Any:
        check(*args)
        _log(name, "CUDA")
        return getattr(importlib.import_module(KERNELS[name]), name)(*args)

    mutated = MUTATED.get(name, ())
    schema = torch.library.infer_schema(getattr(reference, name), mutates_args=mutated)
    operator = torch.library.custom_op(
        f"awareness::{name}", plain, mutates_args=mutated, schema=schema
    )
    operator.register_kernel("cuda")(kernel)
    return operator


encode_states = register("encode_states")
decode_paged = register("decode_paged")
rotate_paged = register("rotate_paged")


@encode_states.register_fake
def _(*args: Any) -> Tensor:
    source, weight = args[5], args[11]
    return weight.new_empty(len(source), weight.shape[1])


@decode_paged.register_fake
@rotate_paged.register_fake
def _(*args: Any) -> None:
    """They write into pages and give nothing back."""


@functools.cache
def _log(name: str, how: str) -> None:
    logger.info("awareness::%s runs on %s", name, how)
