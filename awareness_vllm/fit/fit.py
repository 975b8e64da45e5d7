"""The fit of a W-Matrix: read the anchors, learn the map by a ridge, calibrate it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from awareness_vllm.anchors.corpus import Document, digest, split
from awareness_vllm.fit.calibrate import Snapshot, calibrate, until_a_time
from awareness_vllm.fit.checkpoint import Checkpoint, open_checkpoint
from awareness_vllm.fit.config import Deadlines, FitConfig
from awareness_vllm.fit.distributed import join
from awareness_vllm.fit.examples import CalibrationExamples, Lessons, PairLessons
from awareness_vllm.fit.gather import held_out_rows
from awareness_vllm.fit.layers import full_layers
from awareness_vllm.fit.progress import phase, say
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.regress import choose_layers, regress
from awareness_vllm.fit.texts import LongLessons, calibration_texts
from awareness_vllm.fit.tokens import Workers
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.heads import main_layers

logger = logging.getLogger(__name__)

HELD_OUT_TEXTS = 16
HELD_OUT_SEED = 1_000_000
"""Added to the seed, so that held-out recall texts differ from those of the training."""


def fit(
    source: str | Path,
    target: str | Path,
    anchors: Sequence[Document],
    config: FitConfig,
    *,
    folder: Path | None = None,
    progress: bool = True,
    snapshot: Snapshot | None = None,
    reader: Reader | None = None,
    deadlines: Deadlines | None = None,
) -> WMatrix:
    """The map from one model's states to another's, learned from anchors.

    Args:
        folder: for checkpoints, from which a killed fit resumes.
        snapshot: is given the map before its calibration, and about once a minute of that.
        reader: of both models, where they are loaded already.
        deadlines: at which reading and calibrating end; the latter ends by nothing else then.

    Raises:
        BadInput: too few anchor tokens for the features.
    """
    config, deadlines = config.resolved(), deadlines or Deadlines()
    train, held_out = split(list(anchors), config.held_out, config.seed)
    with phase("structural analysis", progress):
        reader = reader or read_by(source, target, config)
    lessons = lessons_of(train, config.calibration, config.seed, config)
    rank, processes = join()
    if folder is not None and processes > 1:
        folder = folder.with_name(f"{folder.name}.{rank}-of-{processes}")
    reader.tokeniser.text("both tokenizers, loaded once for all processes")
    count = 0 if config.device == "cpu" else config.workers
    with (
        Workers(count, (reader.tokeniser, lessons)) as reader.workers,
        open_checkpoint(folder, _key(reader, train, config)) as checkpoint,
    ):
        with phase("representation alignment", progress):
            if not reader.residual:
                choose(reader, train, config, checkpoint, progress=progress)
            sides, until = (train, held_out), deadlines.anchors
            wmatrix = regress(reader, sides, config, checkpoint, progress=progress, until=until)
        with phase("component mapping", progress):
            say(f"main source layer of each target layer: {main_layers(wmatrix)}", progress)
        if snapshot is not None:
            snapshot(wmatrix)
        if config.calibration:
            with phase("calibration", progress):
                wmatrix = calibrate_map(
                    reader,
                    wmatrix,
                    (lessons, held_out),
                    config,
                    checkpoint,
                    progress=progress,
                    snapshot=snapshot,
                    until=deadlines.calibration,
                )
        r2 = r2_by_part(reader, wmatrix, held_out, config.seed)
    return replace(wmatrix, manifest=wmatrix.manifest.model_copy(update={"r2": r2}))


def read_by(source: str | Path, target: str | Path, config: FitConfig) -> Reader:
    """The reader of both models for a configuration whose device is chosen."""
    folders = resolve_folder(source), resolve_folder(target)
    return Reader(*folders, config.predecessors, config.layers, config.device)


def choose(
    reader: Reader,
    documents: Sequence[Document],
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool,
) -> None:
    """Set the source layers by the configuration's choice, where it is not the spread ones."""
    if config.choice == "best":
        choose_layers(reader, documents, config, checkpoint, progress=progress)
    elif config.choice == "full":
        reader.choose(full_layers(config.layers, reader.source_geometry))


def calibrate_map(
    reader: Reader,
    wmatrix: WMatrix,
    lessons: tuple[Lessons, Sequence[Document]],
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool,
    snapshot: Snapshot | None = None,
    until: float | None = None,
) -> WMatrix:
    """The map after calibration on lessons, judged on held-out documents; the map as it is where
    no document is long enough for a lesson. It ends `until` a time, by `time.monotonic`."""
    if until is not None:
        config = until_a_time(config, checkpoint, until)
    train, held_out = lessons
    if not (total := count_of(train, config.calibration)):
        return wmatrix
    # A single epoch is never ended early: it needs no scores, and none of its texts again.
    several = config.epochs > 1 and config.minutes is None
    scored = HELD_OUT_TEXTS if several else 0
    kept = checkpoint if several and config.device == "cpu" else None
    judges = lessons_of(held_out, scored, config.seed + HELD_OUT_SEED, config)
    examples = CalibrationExamples(
        reader,
        wmatrix,
        train,
        None if config.minutes is not None else total,
        config.batch,
        workers=reader.workers,
        checkpoint=kept,
    )
    judged = CalibrationExamples(
        reader,
        wmatrix,
        judges,
        count_of(judges, scored),
        config.batch,
        checkpoint=kept,
        name="held-out",
    )
    wmatrix, scores = calibrate(
        wmatrix, examples, judged, config, checkpoint, progress=progress, snapshot=snapshot
    )
    logger.info("KL divergence on held-out texts, by epoch: %s", scores)
    return wmatrix


def lessons_of(
    documents: Sequence[Document], count: int, seed: int, config: FitConfig
) -> PairLessons | LongLessons:
    """The lessons of the configuration's kind over documents."""
    if config.lessons == "long" and documents:
        return LongLessons.of(documents, seed)
    return PairLessons(tuple(calibration_texts(documents, count, seed)))


def count_of(lessons: Lessons, count: int) -> int:
    """How many lessons there are, of at most `count`."""
    return min(count, len(lessons)) if isinstance(lessons, PairLessons) else count


def r2_by_part(
    reader: Reader, wmatrix: WMatrix, documents: Sequence[Document], seed: int
) -> dict[str, float]:
    """Shares of the variance of keys and of values explained, on documents not in the fit."""
    if not documents:
        return {}
    width, half = reader.width, reader.target_geometry.key_width
    x, y = (rows.cpu() for rows in held_out_rows(reader, documents, seed))
    keys, values = wmatrix.map(x[:, :width], x[:, width:])
    predicted = torch.cat([s.flatten(1) for s in (*keys, *values)], dim=1)
    if reader.residual:
        y = y + x[:, :width]
    error, variance = (y - predicted).square().mean(0), y.var(0)
    return {
        name: 1 - (error[part].sum() / variance[part].sum()).item()
        for name, part in (("keys", slice(half)), ("values", slice(half, None)))
    }


def _key(reader: Reader, documents: Sequence[Document], config: FitConfig) -> str:
    """The key of a fit's checkpoint: models, anchors and configuration."""
    parts = [reader.source_geometry.weights, reader.target_geometry.weights, digest(documents)]
    return json.dumps([*parts, asdict(config)])
