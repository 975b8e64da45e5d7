"""The cost of a memory on a target: bytes of its KV cache, and seconds until they are written.

Both follow vLLM: its blocks, what it holds of a window, its groups of layers. The seconds are a
linear model of a load (serving/connector/) with the rates that `awareness doctor` measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.models.geometry import Geometry, LayerGeometry

if TYPE_CHECKING:
    from awareness_vllm.compatibility.load_time.speed import Calibration
    from awareness_vllm.wmatrix.manifest import WMatrixManifest

GB = 1e9
PAD_BELOW = 1.5
"""vLLM pads the fewer layers of two kinds up to the more, where these are less than so many times
as many; else it cuts the more into groups as large as the fewer."""


@dataclass(frozen=True)
class MapSize:
    """The numbers that decide a map's work, as in `WMatrixManifest`."""

    rank: int
    source_width: int
    embedding_width: int
    target: Geometry


def target_memory_gb(geometry: Geometry, tokens: int, config: TargetConfig) -> float:
    """1e9 bytes of KV cache that a memory of `tokens` (the target's) holds, on all ranks.

    Exact for vLLM's default allocator, but for models whose layers differ both in their window and
    in their width: there vLLM may pad more than is counted here.
    """
    kinds: dict[int | None, list[LayerGeometry]] = defaultdict(list)
    for layer in geometry.layers:
        kinds[layer.window].append(layer)
    total = 0.0
    for window, layers in kinds.items():
        held = held_tokens(tokens, window, config.block_size)
        width = sum(token_bytes(geometry, layer, config) for layer in layers)
        total += held * width * padded(len(layers), [len(k) for k in kinds.values()]) / len(layers)
    return total / GB


def token_bytes(geometry: Geometry, layer: LayerGeometry, config: TargetConfig) -> int:
    """Bytes of one token's key and value in a layer, on all ranks: fewer heads than ranks are
    replicated."""
    heads = max(layer.heads, config.num_gpus)
    return 2 * heads * layer.head_dim * config.item_bytes(geometry)


def lost_tokens(tokens: int, window: int | None, block: int) -> int:
    """Tokens in the first blocks that vLLM gives back once so many are computed: the next token
    attends to itself and to the last `window - 1` of them."""
    return 0 if window is None else max(0, tokens - window + 1) // block * block


def held_tokens(tokens: int, window: int | None, block: int) -> int:
    """Tokens in the blocks that vLLM holds of a layer."""
    return -(-tokens // block) * block - lost_tokens(tokens, window, block)


def padded(layers: int, counts: Sequence[int]) -> int:
    """Layers that vLLM allocates for one kind of them: its groups are all of one size."""
    least, most = min(counts), max(counts)
    group = most if most < PAD_BELOW * least else least
    return -(-layers // group) * group


def written_bytes(geometry: Geometry, begin: int, end: int, config: TargetConfig) -> int:
    """Bytes that a load writes for the positions begin … end-1 of a prompt, on all ranks."""
    return sum(
        (end - max(begin, min(end, lost_tokens(end, layer.window, config.block_size))))
        * token_bytes(geometry, layer, config)
        for layer in geometry.layers
    )


def typical_map(source: Geometry, target: Geometry) -> MapSize:
    """The size of a map that is fitted by default: half of the source's layers are read."""
    config = FitConfig()
    embeddings = (1 + (config.predecessors or 0)) * target.hidden_size
    return MapSize(config.rank, source.width // 2, embeddings, target)


def map_work(wmatrix: WMatrixManifest | MapSize) -> tuple[int, int]:
    """For one token: numbers that a map reads and writes, and its floating point operations."""
    numbers = wmatrix.source_width + wmatrix.embedding_width + wmatrix.target.width
    return numbers, 2 * wmatrix.rank * numbers


def decoding(wmatrix: WMatrixManifest) -> MapSize:
    """The size of what a map does with a latent, which was encoded before."""
    return MapSize(wmatrix.rank, 0, 0, wmatrix.target)


def load_times_s(
    geometry: Geometry,
    tokens: int,
    config: TargetConfig,
    calibration: Calibration,
    *,
    package_bytes: int,
    wmatrix: WMatrixManifest | MapSize | None,
) -> dict[str, float]:
    """Seconds of a load by temperature, on an idle server.

    They predict `seconds` of `memory` in the server's response, and `vllm:awareness_load_seconds`
    on /metrics: from the engine's request for the memory until it is written. The frontend's
    checks, the native tail and the question come on top.

    Args:
        geometry: the target's.
        tokens: the memory's, as the target counts them, with the sink.
        package_bytes: of the file; it is expected in the operating system's cache.
        wmatrix: None for a copy.
    """
    tail = 0 if wmatrix is None else config.tail
    end = max(0, tokens - tail)
    in_cache = min(end, tokens // config.block_size * config.block_size)

    def written(begin: int) -> float:
        if begin == end:
            return 0.0
        count = written_bytes(geometry, begin, end, config)
        return calibration.write_s(len(geometry.layers), count)

    warm = written(0)
    cold = warm + calibration.read_s(package_bytes)
    if wmatrix is not None:
        numbers, flop = map_work(wmatrix)
        cold += calibration.align_s(tokens, tokens * numbers, tokens * flop)
    return {"cold": cold, "warm": warm, "hot": written(in_cache)}
