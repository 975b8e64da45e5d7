"""A served model with windows, vLLM's configuration for it, and memories to load."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_maps import random_map
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.request import Request

from awareness_vllm.align.realign import realign
from awareness_vllm.files import file_digest
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.file import Package, build, publish
from awareness_vllm.serving.config import ServingConfig, transfer_config
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.params import LoadParams, Part, kv_transfer_params
from awareness_vllm.wmatrix.file import WMatrix

MAX_MODEL_LEN = 512
MAP = "b" * 64
"""The digest of a map."""
SECONDS = 30.0
"""A gate that nobody opens fails the test rather than hang it."""


@dataclass(frozen=True)
class Memory:
    """A memory in the store: its ids, and its keys and values [T, H, D] by layer."""

    part: Part
    ids: list[int]
    keys: list[Tensor]
    values: list[Tensor]

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens begin with the memory, or are its beginning."""
        return list(tokens[: len(self.ids)]) == self.ids[: len(tokens)]


@dataclass
class Served:
    """A model of four layers, every second with a window, in two KV cache groups that share one
    pool of blocks; and its store."""

    HEADS = 2
    HEAD_DIM = 16
    LAYERS = 4
    WINDOW = 32
    BLOCK_SIZE = 16

    config: VllmConfig
    kv_cache_config: KVCacheConfig
    folder: Path
    store: Path
    memories: list[Memory] = field(default_factory=list)
    maps: dict[str, WMatrix] = field(default_factory=dict)

    @functools.cached_property
    def geometry(self) -> Geometry:
        return geometry_of(self.folder, MAX_MODEL_LEN)

    def embed(self, ids: Tensor) -> Tensor:
        """The model's embedding of ids [T], [T, E]."""
        table = torch.randn(
            500, self.geometry.hidden_size, generator=torch.Generator().manual_seed(3)
        )
        return table[ids.cpu()]

    def map_from(self, source: Geometry) -> None:
        """Add a random map from another model: shapes matter here, not worth."""
        self.maps[MAP] = random_map(source, self.geometry, rank=8)

    def mapped(self, package: Package) -> Memory:
        """A new memory of another model, whose map is here."""
        wmatrix = self.maps[MAP]
        aligned = realign(package, wmatrix, self.folder, self.embed, dtype=torch.bfloat16)
        path = publish(package, self.store)
        part = Part(
            memory=path.stem, digest=file_digest(path), wmatrix=MAP, tokens=len(aligned.ids)
        )
        self.memories.append(Memory(part, aligned.ids, aligned.keys, aligned.values))
        return self.memories[-1]

    def window(self, layer_name: str) -> int | None:
        (group,) = (g for g in self.kv_cache_config.kv_cache_groups if layer_name in g.layer_names)
        return getattr(group.kv_cache_spec, "sliding_window", None)

    def pool_of(self, blocks: int | None) -> KVCacheConfig:
        """The cache with fewer blocks for the scheduler to give out."""
        cache = self.kv_cache_config
        return dataclasses.replace(cache, num_blocks=blocks or cache.num_blocks)

    def memory(self, tokens: int, seed: int = 0) -> Memory:
        """A new memory of so many tokens, captured on this very model."""
        generator = torch.Generator().manual_seed(seed)
        shape = tokens, self.HEADS, self.HEAD_DIM
        keys, values = (
            [torch.randn(shape, generator=generator).bfloat16() for _ in range(self.LAYERS)]
            for _ in range(2)
        )
        ids = [(7 * i + seed) % 190 + 10 for i in range(tokens)]
        ends = np.arange(1, tokens + 1, dtype=np.int64)
        package = build(
            geometry=self.geometry,
            text="a" * tokens,
            tokens=ids,
            spans=np.stack((ends - 1, ends), axis=1),
            keys=keys,
            values=values,
            engine="vllm",
            versions={"vllm": "0"},
        )
        path = publish(package, self.store)
        part = Part(memory=path.stem, digest=file_digest(path), tokens=tokens)
        self.memories.append(Memory(part, ids, keys, values))
        return self.memories[-1]


def serve(
    folder: Path,
    store: Path,
    *,
    heads: int = Served.HEADS,
    batched_tokens: int = 64,
    layout: str = "LBNHC",
    retention: int | None = 0,
    **options: Any,
) -> Served:
    """The model in a folder as a server would run it, with so many KV heads on each rank.

    Args:
        layout: of the pages in memory; each backend of CUDA prefers one.
        retention: tokens between windows that the prefix cache keeps, None for all of them; 0, as
            in vLLM, for that at the end of a prompt.
    """
    serving = ServingConfig(store=str(store), **options)
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), dtype="bfloat16", max_model_len=MAX_MODEL_LEN, seed=0
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        cache_config=CacheConfig(
            block_size=Served.BLOCK_SIZE,
            enable_prefix_caching=True,
            prefix_cache_retention_interval=retention,
        ),
        kv_transfer_config=KVTransferConfig(**transfer_config(serving)),
        device_config=DeviceConfig("cpu"),
    )
    config.cache_config.kv_cache_layout = layout
    config.parallel_config.tensor_parallel_size = Served.HEADS // heads
    about: dict[str, Any] = {
        "block_size": Served.BLOCK_SIZE,
        "num_kv_heads": heads,
        "head_size": Served.HEAD_DIM,
        "dtype": torch.bfloat16,
    }
    specs = {
        f"model.layers.{i}.self_attn.attn": FullAttentionSpec(**about)
        if i % 2
        else SlidingWindowSpec(**about, sliding_window=Served.WINDOW)
        for i in range(Served.LAYERS)
    }
    (cache,) = get_kv_cache_configs(config, [dict(specs)], [2**20])
    return Served(config, cache, folder, store)


def save_gemma(folder: Path, tokenizer: Tokenizer) -> Path:
    """A small model with a sliding window in every second layer."""
    kinds = ("sliding_attention", "full_attention")
    config = Gemma3TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=Served.LAYERS,
        num_attention_heads=Served.HEADS,
        num_key_value_heads=Served.HEADS,
        head_dim=Served.HEAD_DIM,
        sliding_window=Served.WINDOW,
        layer_types=[kinds[i % 2] for i in range(Served.LAYERS)],
        max_position_embeddings=MAX_MODEL_LEN,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def request(
    name: str,
    *memories: Memory,
    question: int = 20,
    answer: int = 3,
    capture: object = None,
    plan: LoadParams | None = None,
    ids: list[int] | None = None,
) -> Request:
    """vLLM's request for a prompt: the memories, if any, and a question of so many tokens."""
    if plan is None and memories:
        plan = LoadParams(parts=tuple(memory.part for memory in memories))
    params = kv_transfer_params(plan) if plan else {}
    if capture is not None:
        params[CAPTURE_KEY] = capture
    before = [token for memory in memories for token in memory.ids]
    tail = [(5 * i + len(name)) % 180 + 20 for i in range(question)]
    init_none_hash(sha256)
    return Request(
        request_id=name,
        prompt_token_ids=ids or before + tail,
        sampling_params=SamplingParams(
            max_tokens=answer,
            ignore_eos=True,
            extra_args={"kv_transfer_params": params} if params else None,
        ),
        pooling_params=None,
        cache_salt=plan.cache_salt if plan else None,
        block_hasher=get_request_block_hasher(Served.BLOCK_SIZE, sha256),
    )


class Gate:
    """Files that a worker reads only once the gate is open; `error` is what reading then raises."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.gate = worker, threading.Event()
        self.error: Exception | None = None
        self.read_source = worker.loader.read_source
        worker.loader.read_source = self

    def open(self) -> None:
        """Let the files be read, and wait until those that are asked for have been."""
        self.gate.set()
        sources = [alignment.source for alignment in self.worker.loader.pending.values()]
        assert not wait(sources, SECONDS).not_done

    def __call__(self, part: Part, tenant: str) -> Any:
        assert self.gate.wait(SECONDS)
        if self.error is not None:
            raise self.error
        return self.read_source(part, tenant)
