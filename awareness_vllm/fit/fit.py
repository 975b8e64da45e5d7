"""Fit a W-Matrix: read the anchors, learn the map by a ridge, sharpen it by calibration."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from awareness_vllm.anchors.corpus import Document, digest, split
from awareness_vllm.fit.calibrate import CalibrationConfig, calibrate
from awareness_vllm.fit.checkpoint import Checkpoint, workspace
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.distributed import join
from awareness_vllm.fit.examples import CalibrationExamples
from awareness_vllm.fit.gather import held_out_rows
from awareness_vllm.fit.layers import without_window
from awareness_vllm.fit.progress import phase, say
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.regress import choose_layers, regress
from awareness_vllm.fit.texts import calibration_texts
from awareness_vllm.models.describe import resolve_folder
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.heads import main_layers

logger = logging.getLogger(__name__)

HELD_OUT_TEXTS = 16
HELD_OUT_SEED = 1_000_000
"""Added to the seed: no recall text of the held-out ones is among those that are trained on."""


def fit(
    source: str | Path,
    target: str | Path,
    anchors: Sequence[Document],
    config: FitConfig,
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> WMatrix:
    """Learn the map from one model's states to another's.

    Args:
        folder: for the unfinished work, so that a killed fit goes on where it was.

    Raises:
        BadInput: too few anchor tokens for the features.
    """
    train, held_out = split(list(anchors), config.held_out, config.seed)
    with phase("structural analysis", progress):
        reader = Reader(
            resolve_folder(source), resolve_folder(target), config.predecessors, config.layers
        )
    rank, processes = join()
    if folder is not None and processes > 1:
        folder = folder.with_name(f"{folder.name}.{rank}-of-{processes}")
    with workspace(folder, _key(reader, train, config)) as work:
        with phase("representation alignment", progress):
            if config.choice == "best" and not reader.residual:
                choose_layers(reader, train, config, work, progress=progress)
            elif config.choice == "full" and not reader.residual:
                reader.choose(without_window(config.layers, reader.source_geometry))
            wmatrix = regress(reader, (train, held_out), config, work, progress=progress)
        with phase("component mapping", progress):
            say(f"main source layer of each target layer: {main_layers(wmatrix)}", progress)
        if config.calibration:
            with phase("calibration", progress):
                wmatrix = calibrated(
                    reader, wmatrix, (train, held_out), config, work, progress=progress
                )
        r2 = r2_by_part(reader, wmatrix, held_out, config.seed)
    return replace(wmatrix, manifest=wmatrix.manifest.model_copy(update={"r2": r2}))


def calibrated(
    reader: Reader,
    wmatrix: WMatrix,
    documents: tuple[Sequence[Document], Sequence[Document]],
    config: FitConfig,
    work: Checkpoint,
    *,
    progress: bool,
) -> WMatrix:
    """The map after calibration on the (training, held-out) documents."""
    train, held_out = documents
    pairs = calibration_texts(train, config.calibration, config.seed)
    judges = calibration_texts(held_out, HELD_OUT_TEXTS, config.seed + HELD_OUT_SEED)
    wmatrix, scores = calibrate(
        wmatrix,
        CalibrationExamples(reader, wmatrix, pairs, work, "lesson"),
        # One epoch is never cut short: there is nothing to judge.
        CalibrationExamples(reader, wmatrix, judges if config.epochs > 1 else [], work, "held-out"),
        CalibrationConfig(
            batch=config.batch,
            epochs=config.epochs,
            rate=config.rate,
            patience=config.patience,
            seed=config.seed,
        ),
        work,
        progress=progress,
    )
    logger.info("divergence on held-out texts, by epoch: %s", scores)
    return wmatrix


def r2_by_part(
    reader: Reader, wmatrix: WMatrix, documents: Sequence[Document], seed: int
) -> dict[str, float]:
    """Share of the variance of keys and of values explained, on documents not in the fit."""
    if not documents:
        return {}
    width, half = reader.width, reader.target_geometry.key_width
    x, y = held_out_rows(reader, documents, seed)
    keys, values = wmatrix.map(x[:, :width], x[:, width:])
    predicted = torch.cat([s.flatten(1) for s in (*keys, *values)], dim=1)
    if reader.residual:
        y = y + x[:, :width]
    error, spread = (y - predicted).square().mean(0), y.var(0)
    return {
        name: 1 - (error[part].sum() / spread[part].sum()).item()
        for name, part in (("keys", slice(half)), ("values", slice(half, None)))
    }


def _key(reader: Reader, documents: Sequence[Document], config: FitConfig) -> str:
    """What unfinished work belongs to: models, anchors and configuration."""
    parts = [reader.source_geometry.weights, reader.target_geometry.weights, digest(documents)]
    return json.dumps([*parts, asdict(config)])
