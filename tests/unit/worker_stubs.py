"""A worker with a KV cache of vLLM's own and no engine, and what a load has written to it."""

from __future__ import annotations

from pathlib import Path

import torch
from connector_stubs import MEMORY
from cpu_layers import HEADS, cpu_layer, random_states
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.packages.store import Store, digest_in
from awareness_vllm.serving.connector.capture_queue import CaptureQueue
from awareness_vllm.serving.connector.kv_layout import NULL_BLOCK, KVLayout
from awareness_vllm.serving.connector.kv_reader import read_slots
from awareness_vllm.serving.connector.loader import MemoryLoader
from awareness_vllm.serving.connector.scheduler import LoadSpec
from awareness_vllm.serving.connector.worker import ConnectorWorker, Loaded
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tiers import WarmTier
from awareness_vllm.wmatrix.registry import Registry

KEY = (digest_in(MEMORY), "")
NAMES = ("model.layers.0.attn", "model.layers.1.attn")
SIZES = (32, 3)
"""Tokens of a block in the two KV cache groups. In the cache itself they all have 32: vLLM splits
or joins blocks for its kernels."""
NOWHERE = [NULL_BLOCK] * 6


def made_worker(geometry: Geometry, heads: int = HEADS) -> ConnectorWorker:
    """A worker with two layers in two groups, and one memory of 12 tokens in its warm tier; the
    model has so many heads."""
    rope = Positions(scheme="rope", theta=1e4, rotary_dim=64)
    layer = LayerGeometry(heads=heads, head_dim=64, positions=rope)
    geometry = geometry.model_copy(update={"layers": (layer, layer)})
    model = ServedModel(Path("none"), 1000, geometry)
    layers = {name: cpu_layer(torch.bfloat16, 32, 64, "vec") for name in NAMES}
    layout = KVLayout(layers, dict(zip(NAMES, (0, 1), strict=True)), SIZES)
    loader = MemoryLoader(model, {"": Store(Path("none"))}, torch.bfloat16, WarmTier(2**30))
    ranks = range(heads // HEADS)
    states = [
        torch.cat([random_states(12, 64, torch.bfloat16, seed + 10 * r) for r in ranks], dim=1)
        for seed in range(4)
    ]
    loader.warm.put(KEY, AlignedMemory(list(range(12)), states[:2], states[2:]))
    return ConnectorWorker(
        model, layout, torch.bfloat16, loader, CaptureQueue(), Registry(), load_timeout=30.0
    )


def warm_memory(worker: ConnectorWorker) -> AlignedMemory:
    memory = worker.loader.warm.get(KEY)
    assert isinstance(memory, AlignedMemory)
    return memory


def load_now(worker: ConnectorWorker, load: LoadSpec) -> Loaded:
    """A load whose memories are warm, in the step that begins it."""
    worker.begin(load)
    assert worker.ready() == [load.request_id]
    return worker.finish(load.request_id)


def layer_states(worker: ConnectorWorker, i: int, slots: list[int]) -> tuple[Tensor, Tensor]:
    return read_slots(worker.layout.layers[NAMES[i]], torch.tensor(slots))
