"""Capture with vLLM itself: an offline engine reads the text, our connector reads its blocks back.

Its states have the numerics of a vLLM server, so a memory for the same model is exact there.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from awareness_vllm.errors import AwarenessError
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import read_json, resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.hf import cannot_load
from awareness_vllm.models.tokens import Tokens
from awareness_vllm.packages.capture import read_tokens
from awareness_vllm.packages.file import Package, build, read_states
from awareness_vllm.schema import plain_name
from awareness_vllm.serving.config import ServingConfig, transfer_config
from awareness_vllm.serving.connector.capture_queue import capture_to, keys_and_values
from awareness_vllm.serving.plugin import register, vllm_version

BLOCK_SLACK = 1024
"""Tokens of KV cache beyond the request's own: half-filled blocks, and the null block."""


def capture(folder: str | Path, text: str, *, name: str | None = None) -> Package:
    """Capture a text on a model with an offline vLLM engine, in the model's dtype.

    Raises:
        BadInput: the text does not fit, or the name is not a PlainName.
        AwarenessError: the engine wrote no states.
    """
    if name is not None:
        plain_name(name)
    register()
    path = resolve_folder(folder)
    tokens = read_tokens(path, text)
    length = len(tokens.ids) + 1
    geometry = geometry_of(path, length)
    with tempfile.TemporaryDirectory() as scratch:
        states = Path(scratch) / "states.safetensors"
        _prefill(path, tokens.ids, states, cache_bytes(geometry, length))
        if not states.is_file():
            raise AwarenessError(
                "the engine wrote no states",
                found="see the connector's error in the log above",
                expected="keys and values of all layers",
            )
        tensors = read_states(states)
    return as_package(geometry, text, tokens, tensors, name)


def as_package(
    geometry: Geometry,
    text: str,
    tokens: Tokens,
    states: dict[str, Tensor],
    name: str | None,
    edition_of: str | None = None,
) -> Package:
    """A package of the states that were read back from vLLM's blocks."""
    keys, values = keys_and_values(states, len(geometry.layers))
    return build(
        geometry=geometry,
        text=text,
        tokens=tokens.ids,
        spans=tokens.spans,
        keys=keys,
        values=values,
        engine="vllm",
        versions={"torch": importlib.metadata.version("torch"), "vllm": vllm_version()},
        name=name,
        edition_of=edition_of,
    )


def cache_bytes(geometry: Geometry, tokens: int) -> int:
    """Bytes of KV cache for one request, with room for blocks that are not full; twice, since what
    vLLM adds to pages of layers that differ is not known before it starts."""
    return 2 * state_bytes(geometry, tokens + BLOCK_SLACK)


def state_bytes(geometry: Geometry, tokens: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the keys and values of so many tokens, of all layers; by default in the model's own
    dtype."""
    itemsize = (dtype or getattr(torch, geometry.dtype)).itemsize
    return int(tokens * geometry.width * itemsize)  # the width is that of keys and values


def _prefill(model: Path, ids: list[int], states: Path, cache: int) -> None:
    """One request, its whole prompt computed in one step, so that all its blocks are at hand."""
    from vllm import LLM, SamplingParams

    config = ServingConfig(store=str(states.parent))
    try:
        engine = LLM(
            model=str(model),
            trust_remote_code=False,
            max_model_len=len(ids) + 1,
            max_num_batched_tokens=len(ids) + 1,
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_hybrid_kv_cache_manager=True,
            kv_cache_memory_bytes=cache,
            kv_transfer_config=transfer_config(config),
        )
    except Exception as error:  # vLLM's own checks, and those of the engine's process
        raise cannot_load(model.name, "vllm", read_json(model / "config.json"), error) from error
    engine.generate(
        {"prompt_token_ids": ids},
        SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": capture_to(states)}),
    )
