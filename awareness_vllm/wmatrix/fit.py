"""Fit a W-Matrix: both models read the anchors, a ridge learns the map, calibration sharpens it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.anchors.corpus import Document, digest, split, windows
from awareness_vllm.anchors.recall import recall_texts
from awareness_vllm.errors import BadInput
from awareness_vllm.geometry import resolve_folder
from awareness_vllm.wmatrix.calibrate import CalibrationConfig, calibrate
from awareness_vllm.wmatrix.file import Anchors, WMatrix, WMatrixManifest
from awareness_vllm.wmatrix.reader import Reader, sink_states
from awareness_vllm.wmatrix.solve import reduced_rank_ridge
from awareness_vllm.wmatrix.statistics import Statistics

WINDOW_CHARACTERS = 2400
CHUNK_ROWS = 2048
HELD_OUT = 0.05
CONTEXT_CHARACTERS = 1100
CONTINUATION_CHARACTERS = 400
PROSE_PER_RECALL = 2


@dataclass(frozen=True)
class FitConfig:
    """`tokens` of anchors (target tokens), how many source `layers` are read (None: half), latent
    `rank`, `ridge` as a share of unit variance, how many `predecessors` of a token lend their
    embeddings, and `calibration` steps."""

    tokens: int = 45_000
    layers: int | None = None
    rank: int = 1280
    ridge: float = 0.02
    predecessors: int = 3
    calibration: int = 150
    seed: int = 0


def fit(
    source: str | Path,
    target: str | Path,
    anchors: Sequence[Document],
    config: FitConfig,
    *,
    progress: bool = True,
) -> WMatrix:
    """Learn the map from one model's states to another's.

    Raises:
        BadInput: too few anchor tokens for the features.
    """
    train, held_out = split(list(anchors), HELD_OUT, config.seed)
    reader = Reader(
        resolve_folder(source), resolve_folder(target), config.predecessors, config.layers
    )
    statistics = gather(reader, train, config, progress=progress)
    tokens = statistics.rows
    weight = torch.ones_like(statistics.y_scale)
    mean, scale = statistics.x_mean, 1 / statistics.x_scale
    encode, decode, bias = reduced_rank_ridge(
        statistics, config.rank, config.ridge, weight, config.seed
    )
    sink_keys, sink_values = sink_states(reader.target, reader.sink)
    wmatrix = WMatrix(
        WMatrixManifest(
            source=reader.source_geometry,
            target=reader.target_geometry,
            layers=reader.layers,
            rank=config.rank,
            ridge=config.ridge,
            predecessors=config.predecessors,
            sink=tuple(reader.sink),
            anchors=Anchors(digest=digest(train), documents=len(train), tokens=tokens),
            seed=config.seed,
            r2={},
            versions={p: importlib.metadata.version(p) for p in ("torch", "transformers")},
        ),
        mean=mean,
        scale=scale,
        encode=encode.bfloat16(),
        decode=decode.bfloat16(),
        bias=bias,
        sink_keys=sink_keys,
        sink_values=sink_values,
    )
    if config.calibration:
        texts = calibration_texts(train, config)
        wmatrix = calibrate(
            wmatrix, reader, texts, CalibrationConfig(steps=config.calibration), progress=progress
        )
    r2 = explained(reader, wmatrix, held_out)
    return replace(wmatrix, manifest=wmatrix.manifest.model_copy(update={"r2": r2}))


def gather(
    reader: Reader, documents: Sequence[Document], config: FitConfig, *, progress: bool
) -> Statistics:
    """Read anchors until `config.tokens` rows are gathered, in chunks of bounded memory.

    Raises:
        BadInput: the anchors run out before the features can be told apart.
    """
    statistics: Statistics | None = None
    chunk: list[tuple[Tensor, Tensor]] = []
    rows = 0
    with tqdm(total=config.tokens, unit="tok", desc="anchors", disable=not progress) as bar:
        for text in _shuffled_windows(documents, config.seed):
            x, y = reader.pairs(text)
            chunk.append((x, y))
            rows += len(x)
            bar.update(len(x))
            if sum(len(x) for x, _ in chunk) >= CHUNK_ROWS or rows >= config.tokens:
                xs, ys = (torch.cat(parts) for parts in zip(*chunk, strict=True))
                statistics = statistics or Statistics.start(xs, ys)
                statistics.add(xs, ys)
                chunk = []
            if rows >= config.tokens:
                break
    if chunk and statistics is not None:
        statistics.add(*(torch.cat(parts) for parts in zip(*chunk, strict=True)))
    if statistics is None:
        raise BadInput(
            "too few anchor tokens",
            found=f"{rows} usable tokens",
            expected=f"at least {CHUNK_ROWS}",
            remedy="give more anchors",
        )
    return statistics


def calibration_texts(documents: Sequence[Document], config: FitConfig) -> list[tuple[str, str]]:
    """Pairs of context and continuation: stretches of the anchors, recall texts between them."""
    texts = _shuffled_windows(documents, config.seed + 1)
    pairs = [pair for text in texts[: config.calibration] if (pair := _cut(text))]
    recall = recall_texts(len(pairs) // PROSE_PER_RECALL, config.seed)
    for i, pair in enumerate(recall):
        pairs.insert((i + 1) * (PROSE_PER_RECALL + 1) - 1, pair)
    return pairs


def _cut(text: str) -> tuple[str, str] | None:
    """A context and what follows it, cut between words; None where there is no such place."""
    middle = text.rfind(" ", 0, CONTEXT_CHARACTERS)
    end = text.rfind(" ", 0, CONTEXT_CHARACTERS + CONTINUATION_CHARACTERS)
    enough = middle > CONTEXT_CHARACTERS // 2 and end > middle + CONTINUATION_CHARACTERS // 2
    return (text[:middle], text[middle:end]) if enough else None


def explained(reader: Reader, wmatrix: WMatrix, documents: Sequence[Document]) -> dict[str, float]:
    """Share of the variance of keys and of values explained, on documents not in the fit."""
    width, half = reader.width, reader.target_geometry.key_width
    parts = []
    for text in _shuffled_windows(documents, wmatrix.manifest.seed)[:8]:
        x, y = reader.pairs(text)
        keys, values = wmatrix.map(x[:, :width], x[:, width:])
        parts.append((y, torch.cat([s.flatten(1) for s in (*keys, *values)], dim=1)))
    if not parts:
        return {}
    y, predicted = (torch.cat(p) for p in zip(*parts, strict=True))
    error, spread = (y - predicted).square().mean(0), y.var(0)
    return {
        name: 1 - (error[part].sum() / spread[part].sum()).item()
        for name, part in (("keys", slice(half)), ("values", slice(half, None)))
    }


def _shuffled_windows(documents: Sequence[Document], seed: int) -> list[str]:
    texts = [text for document in documents for text in windows(document, WINDOW_CHARACTERS)]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
