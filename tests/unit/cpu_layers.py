"""Attention layers as far as their KV cache goes, with vLLM's own CPU operator and no engine."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

COUNT, HEADS = 6, 3
"""Blocks of a layer's cache, and its KV heads."""
EMPTY = -7.0
"""A slot that nobody has written."""


@functools.cache
def import_operator() -> bool:
    """Whether vLLM's CPU operator is here; its platform loads it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        current_platform.import_kernels()
    return current_platform.is_cpu()


def cpu_layer(dtype: torch.dtype, size: int, width: int, isa: str) -> Any:
    """One layer with blocks of `size` tokens and heads of `width` numbers, all of them EMPTY."""
    if not import_operator():
        pytest.skip("not a CPU build of vLLM")
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=dtype)  # type: ignore[assignment]
    with set_current_vllm_config(config):
        impl = CPUAttentionBackendImpl(HEADS, width, 1.0, HEADS, None, None, "auto")
    return SimpleNamespace(
        impl=impl,
        kv_cache=torch.full((COUNT, HEADS, size, 2 * width), EMPTY, dtype=dtype),
        num_kv_heads=HEADS,
        isa=isa,
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )


def random_states(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Keys or values [count, HEADS, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEADS, width, generator=generator).to(dtype)
