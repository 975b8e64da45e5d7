"""A benchmark of loads, part by part: reading, tokenizing, aligning, writing.

The timed code is the code that serves: the same reading, tokenizing and `Realignment`, and vLLM's
own operator where its CPU build is installed. Widths are those of two small models; states and
weights are constants, since times do not depend on them.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import itertools
import os
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from awareness_vllm.align.kv_writer import KVWriter, block_tokens
from awareness_vllm.align.realign import Realignment
from awareness_vllm.compatibility.load_time.cost import map_work, written_bytes
from awareness_vllm.compatibility.load_time.speed import Calibration, saved
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.files import home, scratch_folder
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.models.tokens import Tokens, align, tokenize
from awareness_vllm.packages.file import Package, build, publish, read
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.serving.connector import kv_layout
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

Update = Callable[[Any, Tensor, Tensor, Tensor, Tensor], None]
"""Writes keys and values [T, H, D] into slots [T] of a layer's cache [B, H, N, K|V]: the arguments
are the layer, key, value, cache, slot mapping."""

SHORT, LONG = 128, 2048
"""Tokens of the two memories: fixed costs are most of the short one's time."""
LOW_RANK, HIGH_RANK = 128, 1024
"""Ranks of the two maps: matrix products are most of the high one's work."""
LEAST_REST = 0.01
"""The least share of an alignment that is no product: larger products can be slower than by the
number of their operations, and then nothing would be left for the rest."""
BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU."""
REGIONS = 4
"""Regions of the pages that are written to in turn: no server finds them in a processor's cache."""
FLUSH_BYTES = 2**28
"""More than any processor's cache holds."""
ROUNDS, TIME_LIMIT_S = 9, 2.0
"""How often each part is timed, and for how long at most: a slow machine must not take longer."""
DTYPE = torch.bfloat16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TRIM_BYTES, MMAP_BYTES = 2**30, 2**25
"""glibc's names and numbers (malloc.h); it takes no more for the second."""


@dataclass(frozen=True)
class Memory:
    """A synthetic memory: its package, and its text as the target reads it."""

    package: Package
    text: str
    tokens: Tokens


def calibrate() -> Calibration:
    """Measure this machine: some seconds, some hundred megabytes."""
    load = os.getloadavg()[0]
    source, target = geometry("source", 30, 3, 64, 576), geometry("target", 18, 1, 256, 640)
    tokenizer = synthetic_tokenizer()
    short, long = (synthetic_memory(source, tokenizer, count) for count in (SHORT, LONG))
    low, high = (synthetic_map(source, target, rank) for rank in (LOW_RANK, HIGH_RANK))
    written = [written_bytes(target, 0, count, TargetConfig()) for count in (SHORT, LONG)]

    writes = medians(*(writing(target, count) for count in (SHORT, LONG)), between=flush_caches)
    reuse_freed_memory()
    home().mkdir(parents=True, exist_ok=True)
    with scratch_folder(home()) as folder:
        paths = [publish(memory.package, folder, sealed=False) for memory in (short, long)]
        files = [path.stat().st_size for path in paths]
        reads = medians(*(functools.partial(read, path) for path in paths))
    (text,) = medians(lambda: align(long.tokens.spans, tokenize(tokenizer, long.text).spans))
    short_low, long_low, long_high = medians(
        *(aligning(m, w) for m, w in ((short, low), (long, low), (long, high)))
    )

    read_fixed, read_rate = fit_line(*zip(files, reads, strict=True))
    numbers, flop = map_work(low.manifest)
    _, high_flop = map_work(high.manifest)
    _, flop_rate = fit_line((LONG * flop, long_low), (LONG * high_flop, long_high))
    # Without its products, a map's work grows with the numbers that it reads and gives.
    rest = [
        (n * numbers, max(s - n * flop / flop_rate, LEAST_REST * s))
        for n, s in ((SHORT, short_low), (LONG, long_low))
    ]
    align_fixed, numbers_rate = fit_line(*rest)
    write_fixed, write_rate = fit_line(*zip(written, writes, strict=True))
    return Calibration(
        measured=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        hardware=hardware(),
        versions=versions(),
        threads=torch.get_num_threads(),
        load=load,
        read_fixed_s=read_fixed,
        read_bytes_per_s=read_rate,
        text_tokens_per_s=LONG / text,
        align_fixed_s=align_fixed,
        align_numbers_per_s=numbers_rate,
        align_flop_per_s=flop_rate,
        write_layer_s=write_fixed / len(target.layers),
        write_bytes_per_s=write_rate,
    )


def reuse_freed_memory() -> None:
    """Have the allocator reuse freed memory, as in a server that has run for a while.

    A young process gives it back at once, and asking for new pages takes a third of an alignment's
    time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in every C library
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def flush_caches() -> None:
    """Read more than a processor's cache holds, as a model's step does between two loads."""
    torch.ones(FLUSH_BYTES, dtype=torch.uint8).sum()


def medians(
    *runs: Callable[[], object], between: Callable[[], object] = lambda: None
) -> list[float]:
    """Median seconds of each run, taken in turn so that a disturbance meets all of them.

    The first time of each does not count, nor the time of `between`.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    until = time.perf_counter() + TIME_LIMIT_S
    for _ in range(ROUNDS):
        for run, seconds in zip(runs, times, strict=True):
            between()
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        if time.perf_counter() > until:
            break
    return [statistics.median(seconds) for seconds in times]


def aligning(memory: Memory, wmatrix: WMatrix) -> Callable[[], None]:
    """The alignment of a memory that has been read and tokenized."""
    table = torch.ones(wmatrix.manifest.target.vocab_size, wmatrix.manifest.target.hidden_size)
    ids = [*wmatrix.manifest.sink, *memory.tokens.ids]
    source = torch.arange(len(memory.tokens.ids))

    def run() -> None:
        work = Realignment(
            memory.package, wmatrix, ids, source, lambda i: table[i].float(), dtype=DTYPE
        )
        while not work.step():
            pass

    return run


def writing(target: Geometry, count: int) -> Callable[[], None]:
    """The writing of a memory's states, as a worker does it."""
    shapes = [(layer.heads, layer.head_dim) for layer in target.layers]
    keys, values = ([torch.ones(count, *shape, dtype=DTYPE) for shape in shapes] for _ in range(2))
    blocks, update = -(-count // BLOCK), cache_update()
    layers = {
        i: SimpleNamespace(
            kv_cache=torch.ones(REGIONS * blocks, heads, BLOCK, 2 * dim, dtype=DTYPE),
            impl=SimpleNamespace(do_kv_cache_update=update),
        )
        for i, (heads, dim) in enumerate(shapes)
    }
    one_group, all_heads = dict.fromkeys(layers, 0), dict.fromkeys(layers, slice(None))
    writer = KVWriter(layers, one_group, all_heads, target, DTYPE)
    firsts = itertools.cycle(range(0, REGIONS * blocks, blocks))

    def run() -> None:
        first = next(firsts)
        slots = kv_layout.slot_mapping(range(first, first + blocks), BLOCK, 0, count)
        writer.place(keys, values, 0, 0, [slots])

    return run


def cache_update() -> Update:
    """vLLM's own operator, if its CPU build is here, or its equal in torch."""
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
    except ImportError:
        return scatter
    if not current_platform.is_cpu():
        return scatter
    current_platform.import_kernels()
    layout = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def update(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        blocks, heads, size, _ = cache.shape
        keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slot_mapping, layout)

    return update


def scatter(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    size = block_tokens(cache)
    cache[slot_mapping // size, :, slot_mapping % size] = torch.cat((key, value), dim=-1)


def geometry(name: str, layers: int, heads: int, head_dim: int, hidden: int) -> Geometry:
    """A model of rotary layers that are all the same."""
    positions = Positions(scheme="rope", theta=1e4, rotary_dim=head_dim)
    layer = LayerGeometry(heads=heads, head_dim=head_dim, positions=positions)
    return Geometry(
        name=name,
        model_type="llama",
        dtype="bfloat16",
        hidden_size=hidden,
        vocab_size=4096,
        max_positions=2 * LONG,
        layers=(layer,) * layers,
        weights=name,
        tokenizer=name,
    )


def synthetic_tokenizer() -> Tokenizer:
    """Byte-level BPE over real English: real tokenizers take about as long for a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([english()], trainer)
    return tokenizer


def english() -> str:
    """Python's own documentation, as much as is needed."""
    return "\n".join(pydoc_data.topics.topics.values())[: 8 * LONG]


def synthetic_memory(source: Geometry, tokenizer: Tokenizer, count: int) -> Memory:
    """A memory of so many tokens of real English, with constant states."""
    whole = tokenize(tokenizer, english())
    tokens = Tokens(whole.ids[:count], whole.spans[:count])
    text = english().encode()[: tokens.spans[-1, 1]].decode(errors="ignore")
    layers = source.layers
    states = [torch.ones(count, g.heads, g.head_dim, dtype=DTYPE) for g in layers for _ in range(2)]
    package = build(
        geometry=source,
        text=text,
        tokens=tokens.ids,
        spans=tokens.spans,
        keys=states[::2],
        values=states[1::2],
        engine="transformers",
        versions={},
    )
    return Memory(package, text, tokens)


def synthetic_map(source: Geometry, target: Geometry, rank: int) -> WMatrix:
    """A map between two models that reads every other layer, as `awareness fit` makes it."""
    manifest = WMatrixManifest(
        source=source,
        target=target,
        layers=tuple(range(0, len(source.layers), 2)),
        rank=rank,
        predecessors=3,
        sink=(0,),
        anchors=Anchors(digest="", documents=0, tokens=0),
        fit={},
        r2={},
        versions={},
    )
    features = manifest.source_width + manifest.embedding_width
    sinks = [torch.ones(1, layer.heads, layer.head_dim, dtype=DTYPE) for layer in target.layers]
    return WMatrix(
        manifest,
        mean=torch.zeros(features),
        scale=torch.ones(features),
        encode=torch.full((features, rank), 1 / features, dtype=DTYPE),
        decode=torch.full((rank, target.width), 1 / rank, dtype=DTYPE),
        bias=torch.zeros(target.width),
        sink_keys=sinks,
        sink_values=sinks,
    )


def calibrated(*, again: bool = False) -> Calibration:
    """This machine's speed from the file at home; measured now, and saved, where there is none."""
    calibration = saved()
    if calibration is None or not calibration.here or again:
        calibration = calibrate()
        calibration.save()
    return calibration


def fit_line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Fixed seconds, and units per second, of the line through two measurements (units, seconds).

    Neither is ever negative: on a busy machine the larger one can take less time, and then only the
    rate of the whole is known.
    """
    slope = (large[1] - small[1]) / (large[0] - small[0])
    if slope <= 0 or slope * small[0] >= small[1]:
        return 0.0, large[0] / large[1]
    return small[1] - slope * small[0], 1 / slope
