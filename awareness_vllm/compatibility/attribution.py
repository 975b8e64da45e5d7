"""Attribute a pair's loss: the target goes on after a memory with one part of the truth given."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.align.aligner import AlignedMemory, realign
from awareness_vllm.align.features import flat_states, split_states
from awareness_vllm.anchors.corpus import Document, digest
from awareness_vllm.compatibility.ablations import (
    SOURCES,
    Aligned,
    drifts,
    together,
    unmatched,
)
from awareness_vllm.compatibility.degradation import Degradation, Lost, Measures, Part, part
from awareness_vllm.compatibility.unreduced import Unreduced, unreduced
from awareness_vllm.errors import BadInput
from awareness_vllm.geometry import resolve_folder
from awareness_vllm.positions import apply
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.bench import Bench, divergence, surprise
from awareness_vllm.wmatrix.certify import rows_by
from awareness_vllm.wmatrix.evaluate import cut_evenly, joined
from awareness_vllm.wmatrix.file import WMatrix, digest_of, load
from awareness_vllm.wmatrix.reader import Reader

Cut = tuple[str, str, list[int]]
"""Name, context and the ids that follow it."""


def attribute(
    wmatrix: Path,
    source: str | Path,
    target: str | Path,
    texts: Sequence[Document],
    anchors: Sequence[Document],
    *,
    contexts: Sequence[int] = (300,),
    continuation: int = 60,
    limit: int = 16,
    tokens: int = 30_000,
    progress: bool = True,
) -> Degradation:
    """Measure what a W-Matrix's loss comes from.

    Args:
        wmatrix: its file.
        texts: from sources that no anchor came from.
        anchors: what the map was fitted on; `tokens` of them show what its rank leaves out.
        contexts: tokens of context to measure at; where too few texts are long enough for one,
            short ones are read in a row.
        limit: at most so many texts for each of them.

    Raises:
        BadInput: the map's tokens are not the target's, or there are too few texts.
    """
    found = load(wmatrix)
    manifest = found.manifest
    if not manifest.reads_tokens:
        raise BadInput(
            "the loss of a map without text cannot be attributed",
            found="a map that gives a row for each of the source's tokens",
            expected="one that reads the target's tokens: only these have true states",
        )
    bench = Bench(Path(source), Path(target), found)
    by_length = {n: cut(bench, texts, n, continuation, limit) for n in sorted(set(contexts))}
    reader = Reader(resolve_folder(source), bench.target, manifest.predecessors)
    reader.choose(manifest.layers)
    full = unreduced(reader, found, anchors, tokens, progress=progress)
    return Degradation(
        wmatrix=digest_of(wmatrix),
        contexts={
            length: lost(bench, found, reader, full, cuts, progress=progress)
            for length, cuts in by_length.items()
        },
        texts=digest(texts),
        limit=limit,
        continuation=continuation,
        anchor_tokens=full.rows,
        measured=datetime.date.today(),
        hardware=hardware(),
        versions=versions(),
    )


def cut(
    bench: Bench, texts: Sequence[Document], context: int, continuation: int, limit: int
) -> list[Cut]:
    """Contexts of that length with what follows them.

    Raises:
        BadInput: fewer than two.
    """
    cuts = cut_evenly(bench, texts, context, continuation, limit)
    if len(cuts) < (limit or len(texts)):
        cuts = cut_evenly(
            bench, joined(texts, context + continuation), context, continuation, limit
        )
    if len(cuts) < 2:
        raise BadInput(
            "too few texts to attribute a loss on",
            found=f"{len(cuts)} of {context + continuation + 1} tokens",
            expected="at least 2",
            remedy="give more or longer texts, or shorter contexts",
        )
    return cuts


def lost(
    bench: Bench,
    wmatrix: WMatrix,
    reader: Reader,
    full: Unreduced,
    cuts: Sequence[Cut],
    *,
    progress: bool,
) -> Lost:
    """What is lost on these texts."""
    bar = tqdm(cuts, desc="aligned", disable=not progress)
    texts = with_drift([aligned(bench, wmatrix, reader, full, context) for _, context, _ in bar])
    rows: dict[str, list[tuple[float, float]]] = {}
    bar = tqdm(list(zip(cuts, texts, strict=True)), desc="ablations", disable=not progress)
    for (_, context, ids), text in bar:
        read = bench.ids(context)
        native = said(bench, placed(wmatrix, text.truth, read), ids)
        for arm, states in arms(text).items():
            logprobs = said(bench, placed(wmatrix, states, read), ids)
            nll, kl = surprise(logprobs, ids).mean(), divergence(native, logprobs).mean()
            rows.setdefault(arm, []).append((nll.item(), kl.item()))
    figures = {arm: np.array(values) for arm, values in rows.items()}
    kinds = rows_by([name.split("/")[0] for name, _, _ in cuts])
    return Lost(
        all=summed(figures, np.arange(len(cuts))),
        kinds={kind: summed(figures, rows) for kind, rows in sorted(kinds.items())},
    )


@torch.inference_mode()
def aligned(
    bench: Bench, wmatrix: WMatrix, reader: Reader, full: Unreduced, context: str
) -> Aligned:
    """The target's states of one text, as the map gives them and as they are. In float32: rounding
    is not what is measured here."""
    manifest = wmatrix.manifest
    geometry, sink = manifest.target, len(manifest.sink)
    embed = bench.target_model.get_input_embeddings()
    package = bench.package(context)
    memory = realign(package, wmatrix, bench.target, embed, dtype=torch.float32)
    native = bench.native(memory.ids)
    mapped, truth = (flat_states(geometry, m.keys, m.values)[sink:] for m in (memory, native))
    return Aligned(
        geometry=geometry,
        mapped=mapped,
        truth=truth,
        beyond_rank=full.beyond(reader.read(context)),
        drift=torch.empty(0),
        unmatched=unmatched(manifest.layers, len(manifest.source.layers), len(geometry.layers)),
    )


def with_drift(texts: Sequence[Aligned]) -> list[Aligned]:
    """The texts, each with what the others tell of its drift."""
    found = drifts(text.truth - text.mapped for text in texts)
    return [replace(text, drift=drift) for text, drift in zip(texts, found, strict=True)]


def arms(text: Aligned) -> dict[str, Tensor]:
    """A text's states [T, O] in every arm: native, as mapped, with each part of the truth given,
    and with all of them."""
    return {
        "native": text.truth,
        "memory": text.mapped,
        **{name: one.ablate(text.mapped, text) for name, one in SOURCES.items()},
        "together": together(text.mapped, text),
    }


@torch.inference_mode()
def placed(wmatrix: WMatrix, states: Tensor, ids: list[int]) -> AlignedMemory:
    """States [T, O], keys position-free, as cached after the sink."""
    positions = torch.arange(len(wmatrix.manifest.sink), len(ids))
    layers = wmatrix.manifest.target.layers
    free, values = split_states(wmatrix.manifest.target, states)
    keys = [apply(key, positions, g.positions) for key, g in zip(free, layers, strict=True)]
    whole = (
        [torch.cat(pair) for pair in zip(sinks, rest, strict=True)]
        for sinks, rest in ((wmatrix.sink_keys, keys), (wmatrix.sink_values, values))
    )
    return AlignedMemory(ids, *whole)


def said(bench: Bench, memory: AlignedMemory, ids: list[int]) -> Tensor:
    """Log probabilities of the ids but the first, read after a memory, [len(ids) - 1, V]."""
    return bench.logprobs(memory, ids, len(ids) - 1)


def summed(figures: dict[str, np.ndarray], rows: np.ndarray) -> Measures:
    """What the arms [n, 2] say of some of the texts."""

    def measured(column: int) -> Part:
        chosen = {arm: values[rows, column] for arm, values in figures.items()}
        return part(
            chosen["native"],
            chosen["memory"],
            {name: chosen[name] for name in SOURCES},
            chosen["together"],
            {name: one.prior for name, one in SOURCES.items()},
        )

    return Measures(nll=measured(0), kl=measured(1))
