"""Attribute a pair's loss: maps with and without each published constraint, fitted alike."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attribution.constrained import ConstrainedMap, Regression
from attribution.constraints import blocks
from attribution.shares import (
    HEADS,
    LAYERS,
    NORMS,
    POSITIONS,
    RANK,
    SOURCES,
    Lifted,
    part,
    subset,
)
from awareness_vllm.align.realign import AlignedMemory, realign, sources
from awareness_vllm.anchors.corpus import Document, digest, split
from awareness_vllm.compatibility.degradation import Degradation, Lost, Measures
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.certify import rows_by
from awareness_vllm.evaluate.conditions import EvalHarness, kl_divergence, token_nll
from awareness_vllm.evaluate.evaluate import Excerpt, join_documents, take_excerpts
from awareness_vllm.files import file_digest
from awareness_vllm.fit.checkpoint import Checkpoint, open_checkpoint
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.gather import gather, held_out_rows
from awareness_vllm.fit.progress import say
from awareness_vllm.fit.reader import Reader, Row
from awareness_vllm.fit.regress import fisher_weight
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rotate
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.features import flat_states, split_states
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.heads import heads

Maps = dict[Lifted, ConstrainedMap]
"""By which of HEADS and LAYERS are lifted: one regression each, at full rank and reduced."""


@dataclass(frozen=True)
class Text:
    """One text's memory: the target's `ids`, the sink first; what is `served` of it, and the
    target's own states after the sink, `truth` [T, O], keys position-free. `counted` [T] are the
    positions of the source tokens that the target's are aligned to, from the text's beginning."""

    ids: list[int]
    served: AlignedMemory
    truth: Tensor
    counted: Tensor


def attribute(
    wmatrix: Path,
    source: str | Path,
    target: str | Path,
    texts: Sequence[Document],
    anchors: Sequence[Document],
    *,
    contexts: Mapping[int, int],
    continuation: int = 60,
    tokens: int = 100_000,
    folder: Path | None = None,
    progress: bool = True,
) -> Degradation:
    """Measure what the loss between two models comes from.

    Args:
        wmatrix: the pair's file: its layers are read, its rank is the limited one, and what it
            loses itself is measured beside.
        texts: from sources that no anchor came from.
        anchors: what the maps are fitted on, `tokens` of them.
        contexts: tokens of context to measure at, and how many texts at most for each; where too
            few are long enough, short ones are read in a row.
        folder: for the unfinished work, so that what was gathered is not lost with a killed run.

    Raises:
        BadInput: the map's tokens are not the target's, or there are too few texts or anchors.
    """
    served = map_with_text(wmatrix)
    manifest = served.manifest
    harness = EvalHarness(Path(source), Path(target), served)
    by_length = {
        length: cut(harness, texts, length, continuation, limit)
        for length, limit in sorted(contexts.items())
    }
    reader = Reader(resolve_folder(source), harness.target, manifest.predecessors)
    reader.residual = False  # of a variant, too, everything is learned
    reader.choose(manifest.layers)
    documents = split(list(anchors), FitConfig.held_out, FitConfig.seed)
    key = [manifest.source.weights, manifest.target.weights, manifest.layers, digest(documents[0])]
    with open_checkpoint(folder, json.dumps(key)) as work:
        maps, rows = fitted(reader, documents, manifest.rank, tokens, work, progress=progress)
        lost_at = {
            length: lost(harness, served, reader, maps, cuts, progress=progress)
            for length, cuts in by_length.items()
        }
    return Degradation(
        wmatrix=file_digest(wmatrix),
        contexts=lost_at,
        texts=digest(texts),
        continuation=continuation,
        anchor_tokens=rows,
        rank=manifest.rank,
        measured=datetime.date.today(),
        hardware=hardware(),
        versions=versions(),
    )


def map_with_text(path: Path) -> WMatrix:
    """The W-Matrix of a file.

    Raises:
        BadInput: its rows are the source's tokens.
    """
    wmatrix = load(path)
    if not wmatrix.manifest.reads_tokens:
        raise BadInput(
            "the loss of a map without text cannot be attributed",
            found="a map that gives a row for each of the source's tokens",
            expected="one that reads the target's tokens: only these have true states",
        )
    return wmatrix


def fitted(
    reader: Reader,
    documents: tuple[Sequence[Document], Sequence[Document]],
    rank: int,
    tokens: int,
    work: Checkpoint,
    *,
    progress: bool,
) -> tuple[Maps, int]:
    """A map for each way to read the source, from one set of sums over the (training, held-out)
    documents; and how many tokens there were."""
    train, held_out = documents
    config = FitConfig(tokens=tokens, predecessors=reader.predecessors)
    sums = gather(reader, train, config, work, progress=progress)
    rows, scale = sums.rows, sums.x_std
    weight = fisher_weight(reader, train, sums, config, progress=progress)
    held_out_pairs = held_out_rows(reader, held_out or train, config.seed)
    regression = Regression.of(sums, held_out_pairs, weight)
    ends = reader.source_geometry, reader.layers, reader.target_geometry
    maps: Maps = {}
    for lifted in map(frozenset, ((), (HEADS,), (LAYERS,), (HEADS, LAYERS))):
        maps[lifted] = regression.solve(blocks(*ends, scale, lifted), rank, config.seed)
        say(f"lifted: {sorted(lifted) or 'nothing'}, ridge: {maps[lifted].ridge}", progress)
    return maps, rows


def cut(
    harness: EvalHarness, texts: Sequence[Document], context: int, continuation: int, limit: int
) -> list[Excerpt]:
    """Contexts of that length with what follows them.

    Raises:
        BadInput: fewer than two.
    """
    cuts = take_excerpts(harness, texts, context, continuation, limit)
    if len(cuts) < (limit or len(texts)):
        cuts = take_excerpts(
            harness, join_documents(texts, context + continuation), context, continuation, limit
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
    harness: EvalHarness,
    wmatrix: WMatrix,
    reader: Reader,
    maps: Maps,
    cuts: Sequence[Excerpt],
    *,
    progress: bool,
) -> Lost:
    """What is lost on these texts."""
    bar = tqdm(cuts, desc="texts", disable=not progress)
    nats = [losses(harness, wmatrix, reader, maps, context, ids) for _, context, ids in bar]
    figures = np.stack(nats, axis=2)
    kinds = rows_by([name.split("/")[0] for name, _, _ in cuts])
    return Lost(
        all=measures(figures),
        kinds={kind: measures(figures[:, :, rows]) for kind, rows in sorted(kinds.items())},
    )


def measures(figures: np.ndarray) -> Measures:
    """What the losses [1 + 32, 2, n] of some texts say, as `losses` gives them."""
    nll, kl = (part(figures[1:, i], figures[0, i]) for i in range(2))
    return Measures(nll=nll, kl=kl)


@torch.inference_mode()
def losses(
    harness: EvalHarness, wmatrix: WMatrix, reader: Reader, maps: Maps, context: str, ids: list[int]
) -> np.ndarray:
    """What the target's predictions lose after one text, in nats a token: by surprise and by
    divergence from native reading, of the W-Matrix itself and of the 32 maps, [1 + 32, 2]."""
    text = as_read(harness, wmatrix, context)
    native = said(harness, placed(wmatrix, text.ids, text.truth), ids)
    found = []
    for memory in (text.served, *conditions(wmatrix, text, reader.read(context), maps)):
        logprobs = said(harness, memory, ids)
        surprised = token_nll(logprobs, ids) - token_nll(native, ids)
        found.append((surprised.mean().item(), kl_divergence(native, logprobs).mean().item()))
    return np.array(found)


def conditions(wmatrix: WMatrix, text: Text, row: Row, maps: Maps) -> Iterator[AlignedMemory]:
    """A text's memory by each of the 32 maps, in the order of `subset`."""
    width = wmatrix.manifest.source_width
    full = {way: one.states(row.features, row.masked, width) for way, one in maps.items()}
    reduced = {way: one.reduced(full[way]) for way, one in maps.items()}
    for lifted in map(subset, range(2 ** len(SOURCES))):
        way = lifted & {HEADS, LAYERS}
        states = full[way] if RANK in lifted else reduced[way]
        if NORMS in lifted:
            states = with_norms(wmatrix.manifest.target, states, text.truth)
        yield placed(wmatrix, text.ids, states, None if POSITIONS in lifted else text.counted)


def as_read(harness: EvalHarness, wmatrix: WMatrix, context: str) -> Text:
    """One text as both models have it. In float32: rounding is not what is measured here."""
    manifest = wmatrix.manifest
    package = harness.package(context)
    embed = harness.target_model.get_input_embeddings()
    ids, index = sources(package, manifest, harness.target)
    native = harness.native(ids)
    # Tokens that the source's own tokenizer puts before any text hold no byte of it.
    before = int((package.spans[:, 1] == 0).sum())
    return Text(
        ids=ids,
        served=realign(package, wmatrix, harness.target, embed, dtype=torch.float32),
        truth=flat_states(manifest.target, native.keys, native.values)[len(manifest.sink) :],
        counted=(index - before).clamp_min(0) + len(manifest.sink),
    )


def with_norms(geometry: Geometry, states: Tensor, truth: Tensor) -> Tensor:
    """States [T, O] with each head's keys, and its values, scaled so that their mean norm over the
    text is that of the target's own."""
    scaled = states.clone()
    for _, head in heads(geometry, range(len(geometry.layers))):
        ours, theirs = (s[:, head].norm(dim=1).mean() for s in (states, truth))
        scaled[:, head] *= theirs / ours.clamp_min(1e-6)
    return scaled


def placed(
    wmatrix: WMatrix, ids: list[int], states: Tensor, positions: Tensor | None = None
) -> AlignedMemory:
    """States [T, O], keys position-free, as cached after the sink: at their own positions, or at
    others [T]."""
    if positions is None:
        positions = torch.arange(len(wmatrix.manifest.sink), len(ids))
    layers = wmatrix.manifest.target.layers
    free, values = split_states(wmatrix.manifest.target, states)
    keys = [rotate(key, positions, g.positions) for key, g in zip(free, layers, strict=True)]
    whole = (
        [torch.cat(pair) for pair in zip(sinks, rest, strict=True)]
        for sinks, rest in ((wmatrix.sink_keys, keys), (wmatrix.sink_values, values))
    )
    return AlignedMemory(ids, *whole)


def said(harness: EvalHarness, memory: AlignedMemory, ids: list[int]) -> Tensor:
    """Log probabilities of the ids but the first, read after a memory, [len(ids) - 1, V]."""
    return harness.logprobs(memory, ids, len(ids) - 1)
