"""Loads rehearsed part by part on made-up states, to time them.

What is timed is the code that serves: the same reading, tokenizing and `Realignment`, and vLLM's
own operator where its CPU build is installed. Widths are those of two small models; states and
weights are made up, since times do not depend on them.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import itertools
import os
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from awareness_vllm.align.kv_writer import KVWriter
from awareness_vllm.align.realign import Realignment
from awareness_vllm.compatibility.load_time.cost import map_work, written_bytes
from awareness_vllm.compatibility.load_time.speed import Calibration, saved
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.files import home
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.models.tokens import Tokens, align, tokenize
from awareness_vllm.packages.file import Package, build, publish, read
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

Update = Callable[[Any, Tensor, Tensor, Tensor, Tensor], None]
"""Writes a layer's keys and values [T, H, D] into slots [T] of its pages [B, H, N, K|V]: the
arguments are the layer, key, value, pages, slots."""

FEW, MANY = 128, 2048
"""Tokens of the memories that are rehearsed: of one fixed costs are most, of the other little."""
THIN, THICK = 128, 1024
"""Ranks of the maps: the products of one are little of its work, those of the other most."""
BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU."""
TURNS = 4
"""Places in the pages that are written to in turn: no server finds them in a processor's cache."""
FORGOTTEN_BYTES = 2**28
ROUNDS, ENOUGH_S = 9, 2.0
"""How often each part is timed, and for how long at most: a slow machine must not take longer."""
DTYPE = torch.bfloat16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, MMAP_BYTES = 2**30, 2**25
"""glibc's names and numbers (malloc.h); it takes no more for the second."""


@dataclass(frozen=True)
class Memory:
    """A made-up memory: its package, and its text as the target reads it."""

    package: Package
    text: str
    tokens: Tokens


def calibrate() -> Calibration:
    """Measure this machine: some seconds, some hundred megabytes."""
    load = os.getloadavg()[0]
    source, target = geometry("source", 30, 3, 64, 576), geometry("target", 18, 1, 256, 640)
    tokenizer = made_up_tokenizer()
    few, many = (made_up_memory(source, tokenizer, count) for count in (FEW, MANY))
    thin, thick = (made_up_map(source, target, rank) for rank in (THIN, THICK))
    sizes = [written_bytes(target, 0, count, TargetConfig()) for count in (FEW, MANY)]

    writes = medians(*(writing(target, count) for count in (FEW, MANY)), between=forget)
    keep_freed_memory()
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".doctor-") as folder:
        paths = [publish(memory.package, Path(folder)) for memory in (few, many)]
        files = [path.stat().st_size for path in paths]
        reads = medians(*(functools.partial(read, path) for path in paths))
    (text,) = medians(lambda: align(many.tokens.spans, tokenize(tokenizer, many.text).spans))
    little, plain, products = medians(
        *(aligning(m, w) for m, w in ((few, thin), (many, thin), (many, thick)))
    )

    read_fixed, read_rate = line(*zip(files, reads, strict=True))
    numbers, flop = map_work(thin.manifest)
    _, more = map_work(thick.manifest)
    _, flop_rate = line((MANY * flop, plain), (MANY * more, products))
    # Without its products, a map's work grows with the numbers that it reads and gives.
    rest = [(n * numbers, s - n * flop / flop_rate) for n, s in ((FEW, little), (MANY, plain))]
    align_fixed, numbers_rate = line(*rest)
    write_fixed, write_rate = line(*zip(sizes, writes, strict=True))
    return Calibration(
        measured=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        hardware=hardware(),
        versions=versions(),
        threads=torch.get_num_threads(),
        load=load,
        read_fixed_s=read_fixed,
        read_bytes_per_s=read_rate,
        text_tokens_per_s=MANY / text,
        align_fixed_s=align_fixed,
        align_numbers_per_s=numbers_rate,
        align_flop_per_s=flop_rate,
        write_layer_s=write_fixed / len(target.layers),
        write_bytes_per_s=write_rate,
    )


def keep_freed_memory() -> None:
    """Let freed memory be used again, as in a server that has run for a while.

    A young process gives it back at once, and is given new pages in a third of an alignment's time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in every C library
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def forget() -> None:
    """Read more than any processor's cache holds, as a model's step does between two loads."""
    torch.ones(FORGOTTEN_BYTES, dtype=torch.uint8).sum()


def medians(
    *runs: Callable[[], object], between: Callable[[], object] = lambda: None
) -> list[float]:
    """Median seconds of each, run in turn so that what disturbs the machine disturbs all of them.

    What each takes the first time does not count, nor what is done `between` them.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    until = time.perf_counter() + ENOUGH_S
    for _ in range(ROUNDS):
        for run, found in zip(runs, times, strict=True):
            between()
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
        if time.perf_counter() > until:
            break
    return [statistics.median(found) for found in times]


def aligning(memory: Memory, wmatrix: WMatrix) -> Callable[[], None]:
    """Align a memory that has been read and tokenized."""
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
    """Write a memory's states as a worker does."""
    shapes = [(layer.heads, layer.head_dim) for layer in target.layers]
    keys, values = ([torch.ones(count, *shape, dtype=DTYPE) for shape in shapes] for _ in range(2))
    blocks, update = -(-count // BLOCK), operator()
    layers = {
        i: SimpleNamespace(
            kv_cache=torch.ones(TURNS * blocks, heads, BLOCK, 2 * dim, dtype=DTYPE),
            impl=SimpleNamespace(do_kv_cache_update=update),
        )
        for i, (heads, dim) in enumerate(shapes)
    }
    one_group, all_heads = dict.fromkeys(layers, 0), dict.fromkeys(layers, slice(None))
    writer = KVWriter(layers, one_group, all_heads, target, DTYPE)
    begins = itertools.cycle(range(0, TURNS * blocks * BLOCK, blocks * BLOCK))

    def run() -> None:
        begin = next(begins)
        slot_mapping = [torch.tensor(list(range(begin, begin + count)), dtype=torch.int64)]
        writer.place(keys, values, 0, 0, slot_mapping)

    return run


def operator() -> Update:
    """vLLM's own operator, if its CPU build is here, or what does the same in torch."""
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
    except ImportError:
        return scatter
    if not current_platform.is_cpu():
        return scatter
    current_platform.import_kernels()
    layout = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def update(layer: Any, key: Tensor, value: Tensor, page: Tensor, slot_mapping: Tensor) -> None:
        blocks, heads, size, _ = page.shape
        keys, values = page.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slot_mapping, layout)

    return update


def scatter(layer: Any, key: Tensor, value: Tensor, page: Tensor, slot_mapping: Tensor) -> None:
    size = page.shape[2]
    page[slot_mapping // size, :, slot_mapping % size] = torch.cat((key, value), dim=-1)


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
        max_positions=2 * MANY,
        layers=(layer,) * layers,
        weights=name,
        tokenizer=name,
    )


def made_up_tokenizer() -> Tokenizer:
    """Byte-level BPE over real English: real tokenizers take about as long for a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([english()], trainer)
    return tokenizer


def english() -> str:
    """Python's own documentation, as much as is needed."""
    return "\n".join(pydoc_data.topics.topics.values())[: 8 * MANY]


def made_up_memory(source: Geometry, tokenizer: Tokenizer, count: int) -> Memory:
    """A memory of so many tokens of real English, with made-up states."""
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


def made_up_map(source: Geometry, target: Geometry, rank: int) -> WMatrix:
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
        encode=torch.ones(features, rank, dtype=DTYPE),
        decode=torch.ones(rank, target.width, dtype=DTYPE),
        bias=torch.zeros(target.width),
        sink_keys=sinks,
        sink_values=sinks,
    )


def calibrated(*, again: bool = False) -> Calibration:
    """What was measured of this machine; measured now where nobody did, and kept."""
    found = saved()
    if found is None or not found.here or again:
        found = calibrate()
        found.save()
    return found


def line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Fixed seconds, and units per second, of the line through two measurements (units, seconds).

    Neither is ever negative: on a busy machine the larger one can take less time, and then nothing
    is known but the rate of the whole.
    """
    slope = (large[1] - small[1]) / (large[0] - small[0])
    if slope <= 0 or slope * small[0] >= small[1]:
        return 0.0, large[0] / large[1]
    return small[1] - slope * small[0], 1 / slope
