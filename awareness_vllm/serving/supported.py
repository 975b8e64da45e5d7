"""Configurations of vLLM under which memories cannot be served right: refused at start by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from awareness_vllm.errors import UnsupportedServer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SINGLE = {
    "pipeline_parallel_size": "--tensor-parallel-size instead: each rank must hold all layers",
    "decode_context_parallel_size": "leave it out: each rank must hold all tokens",
    "prefill_context_parallel_size": "leave it out: each rank must hold all tokens",
    "data_parallel_size": "a server of its own for each replica, behind a load balancer: heads, "
    "captures and warm memories belong to one engine",
}
"""Fields of vLLM's ParallelConfig, and of its arguments, that must be 1; what to do instead."""
KV_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""The KV cache dtypes whose pages are states, each times a factor: neither scales nor several
values to a byte lie between them."""
E4M3 = ("fp8", "fp8_e4m3")
E4M3_SINCE = (8, 9)
"""The compute capability from which on a CUDA device converts float8 e4m3."""


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse an engine's configuration, however it was started.

    Raises:
        UnsupportedServer
    """
    check_parallel(vllm_config.parallel_config)
    cache = vllm_config.cache_config
    check_cache(cache.cache_dtype, cache.kv_cache_dtype_skip_layers, cuda_capability())


def check_arguments(args: Namespace) -> None:
    """Refuse the arguments of `vllm serve`, before anything is loaded.

    Raises:
        UnsupportedServer
    """
    from vllm import envs

    if envs.VLLM_USE_RUST_FRONTEND:
        raise UnsupportedServer(
            "vLLM's Rust front end loads no endpoint plugins: it would ignore memories",
            found="VLLM_USE_RUST_FRONTEND",
            expected="its front end in Python",
            remedy="unset VLLM_USE_RUST_FRONTEND",
        )
    if args.grpc:
        raise UnsupportedServer(
            "vLLM's gRPC server takes no memories",
            found="--grpc",
            expected="its HTTP server",
            remedy="leave out --grpc",
        )
    check_parallel(args)
    check_cache(args.kv_cache_dtype, args.kv_cache_dtype_skip_layers, cuda_capability())


def check_parallel(config: Any) -> None:
    """Refuse an engine of which no worker has all layers and tokens, and several engines.

    Raises:
        UnsupportedServer
    """
    for name, remedy in SINGLE.items():
        if (size := getattr(config, name)) > 1:
            raise UnsupportedServer(
                f"memories do not work with {name.removesuffix('_size').replace('_', ' ')}",
                found=f"--{name.replace('_', '-')} {size}",
                expected="1",
                remedy=remedy,
            )


def check_cache(
    dtype: str, skipped_layers: Collection[str] | None, capability: tuple[int, int] | None
) -> None:
    """Refuse a KV cache that does not hold plain states, or that this device cannot convert.

    Args:
        skipped_layers: those that keep the model's dtype beside others with `dtype`.
        capability: the CUDA device's; None without one.

    Raises:
        UnsupportedServer
    """
    if dtype not in KV_DTYPES:
        raise UnsupportedServer(
            "memories cannot be written into this KV cache",
            found=f"--kv-cache-dtype {dtype}",
            expected=f"one of {', '.join(KV_DTYPES)}",
            remedy="--kv-cache-dtype fp8, or auto",
        )
    if skipped_layers and dtype.startswith("fp8"):
        raise UnsupportedServer(
            "memories cannot be written into a KV cache of several dtypes",
            found=f"--kv-cache-dtype-skip-layers {' '.join(skipped_layers)}",
            expected="one dtype in all layers",
            remedy="leave it out, or --kv-cache-dtype auto",
        )
    if dtype in E4M3 and capability is not None and capability < E4M3_SINCE:
        raise UnsupportedServer(
            "this GPU cannot convert float8 e4m3",
            found=f"--kv-cache-dtype {dtype} with compute capability "
            f"{'.'.join(map(str, capability))}",
            expected=f"{'.'.join(map(str, E4M3_SINCE))} or later (Ada, Hopper, Blackwell)",
            remedy="--kv-cache-dtype fp8_e5m2, or auto",
        )


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the first CUDA device; None without one."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    capability = current_platform.get_device_capability()
    return None if capability is None else (capability.major, capability.minor)
