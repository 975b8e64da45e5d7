"""Fit a W-Matrix: both models read the anchors, a ridge learns the map, calibration sharpens it."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.anchors.corpus import Document, digest, split, windows
from awareness_vllm.anchors.recall import recall_texts
from awareness_vllm.distributed import join
from awareness_vllm.errors import BadInput
from awareness_vllm.geometry import resolve_folder
from awareness_vllm.wmatrix.calibrate import CalibrationConfig, calibrate
from awareness_vllm.wmatrix.file import Anchors, WMatrix, WMatrixManifest
from awareness_vllm.wmatrix.importance import importance, output_weight
from awareness_vllm.wmatrix.layers import Elimination
from awareness_vllm.wmatrix.lessons import Lessons
from awareness_vllm.wmatrix.mapping import main_layers
from awareness_vllm.wmatrix.reader import Reader, sink_states
from awareness_vllm.wmatrix.solve import choose_ridge, reduced_rank_ridge, round_trip_error
from awareness_vllm.wmatrix.statistics import Statistics
from awareness_vllm.wmatrix.workspace import Workspace, workspace

logger = logging.getLogger(__name__)

WINDOW_CHARACTERS = 2400
CHUNK_ROWS = 4096
"""Rows after which the sums are saved: a kill loses no more than these."""
HELD_OUT = 0.05
HELD_OUT_TEXTS = 16
HELD_OUT_SEED = 1_000_000
"""Added to the seed: no recall text of the held-out ones is among those that are trained on."""
JUDGING_TEXTS = 12
"""Texts on which the importance of the target's states is measured."""
JUDGING_SEED = 2_000_000
CHOICE_TOKENS = 15_000
CHOICE_RIDGE = 0.02
"""Rows and ridge of the small regression that chooses the source's layers."""
CONTEXT_CHARACTERS = 1100
CONTINUATION_CHARACTERS = 400
PROSE_PER_RECALL = 2


@dataclass(frozen=True)
class FitConfig:
    """`tokens` of anchors (target tokens), how many source `layers` are read (None: half) and by
    which `choice` ("spread" evenly, or the "best"), latent `rank`, `ridge` as a share of unit
    variance (None: chosen on held-out documents), how many `predecessors` of a token lend their
    embeddings; `calibration` texts, `batch` of them a step, gone through `epochs` times with a
    relative step `rate`, until `patience` epochs bring nothing better on held-out documents."""

    tokens: int = 45_000
    layers: int | None = None
    choice: Literal["spread", "best"] = "spread"
    rank: int = 1152
    ridge: float | None = None
    predecessors: int = 3
    calibration: int = 160
    batch: int = 1
    epochs: int = 1
    rate: float = 3e-3
    patience: int = 3
    held_out: float = HELD_OUT
    seed: int = 0


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
            wmatrix = regress(reader, (train, held_out), config, work, progress=progress)
        with phase("component mapping", progress):
            say(f"main source layer of each target layer: {main_layers(wmatrix)}", progress)
        if config.calibration:
            with phase("calibration", progress):
                wmatrix = calibrated(
                    reader, wmatrix, (train, held_out), config, work, progress=progress
                )
        r2 = explained(reader, wmatrix, held_out, config.seed)
    return replace(wmatrix, manifest=wmatrix.manifest.model_copy(update={"r2": r2}))


@contextmanager
def phase(name: str, progress: bool) -> Iterator[None]:
    """Say on stderr how long a phase of the fit took."""
    started = time.perf_counter()
    yield
    say(f"{name}: {time.perf_counter() - started:.0f} s", progress)


def say(line: str, progress: bool) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def calibrated(
    reader: Reader,
    wmatrix: WMatrix,
    documents: tuple[Sequence[Document], Sequence[Document]],
    config: FitConfig,
    work: Workspace,
    *,
    progress: bool,
) -> WMatrix:
    """The map after calibration on the (training, held-out) documents."""
    train, held_out = documents
    pairs = calibration_texts(train, config.calibration, config.seed)
    judges = calibration_texts(held_out, HELD_OUT_TEXTS, config.seed + HELD_OUT_SEED)
    wmatrix, scores = calibrate(
        wmatrix,
        Lessons(reader, wmatrix, pairs, work, "lesson"),
        # One epoch is never cut short: there is nothing to judge.
        Lessons(reader, wmatrix, judges if config.epochs > 1 else [], work, "held-out"),
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


def choose_layers(
    reader: Reader,
    documents: Sequence[Document],
    config: FitConfig,
    work: Workspace,
    *,
    progress: bool,
) -> None:
    """Have the reader read the source's layers without which a small regression loses most."""
    if (kept := work.load("layers")) is not None:
        return reader.choose(tuple(kept[1]["layers"]))
    count = len(reader.layers)
    reader.choose(tuple(range(len(reader.source_geometry.layers))))
    few = replace(config, tokens=min(config.tokens, CHOICE_TOKENS))
    with workspace(None, "choice") as scratch:
        statistics = gather(reader, documents, few, scratch, progress=progress)
    weight = fisher_weight(reader, documents, statistics, config, progress=progress)
    elimination = Elimination(
        statistics, reader.source_geometry, weight, config.ridge or CHOICE_RIDGE
    )
    reader.choose(elimination.keep(count))
    say(f"source layers: {reader.layers}", progress)
    work.save("layers", {}, {"layers": reader.layers})


def regress(
    reader: Reader,
    documents: tuple[Sequence[Document], Sequence[Document]],
    config: FitConfig,
    work: Workspace,
    *,
    progress: bool,
) -> WMatrix:
    """The map by ridge regression alone, on (training, held-out) documents."""
    statistics = gather(reader, documents[0], config, work, progress=progress)
    weight, ridge = weighting(reader, documents, statistics, config, work, progress=progress)
    return solved(reader, documents[0], statistics, weight, replace(config, ridge=ridge))


def solved(
    reader: Reader,
    train: Sequence[Document],
    statistics: Statistics,
    weight: Tensor,
    config: FitConfig,
) -> WMatrix:
    """The map of one rank and ridge. Consumes the statistics."""
    assert config.ridge is not None
    tokens, mean, scale = statistics.rows, statistics.x_mean, 1 / statistics.x_scale
    encode, decode, bias = reduced_rank_ridge(
        statistics, config.rank, config.ridge, weight, config.seed
    )
    error = round_trip_error(statistics.gram, encode)
    sink_keys, sink_values = sink_states(reader.target, reader.sink)
    return WMatrix(
        WMatrixManifest(
            source=reader.source_geometry,
            target=reader.target_geometry,
            layers=reader.layers,
            rank=config.rank,
            predecessors=config.predecessors,
            residual=reader.residual,
            sink=tuple(reader.sink),
            anchors=Anchors(digest=digest(train), documents=len(train), tokens=tokens),
            fit=asdict(config),
            r2={},
            reconstruction_error=error,
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


def weighting(
    reader: Reader,
    documents: tuple[Sequence[Document], Sequence[Document]],
    statistics: Statistics,
    config: FitConfig,
    work: Workspace,
    *,
    progress: bool,
) -> tuple[Tensor, float]:
    """What the regression minimises: the weight of each standardised target [O], and the ridge."""
    if (kept := work.load("weighting")) is not None:
        return kept[0]["weight"], kept[1]["ridge"]
    train, held_out = documents
    weight = fisher_weight(reader, train, statistics, config, progress=progress)
    ridge = config.ridge
    if ridge is None:
        x, y = held_out_rows(reader, held_out or train, config.seed)
        ridge = choose_ridge(statistics, x, y, weight, config.seed)
        say(f"ridge: {ridge}", progress)
    work.save("weighting", {"weight": weight}, {"ridge": ridge})
    return weight, ridge


def fisher_weight(
    reader: Reader,
    documents: Sequence[Document],
    statistics: Statistics,
    config: FitConfig,
    *,
    progress: bool,
) -> Tensor:
    """The weight of each standardised target [O]: what the target's predictions hang on."""
    texts = calibration_texts(documents, JUDGING_TEXTS, config.seed + JUDGING_SEED)
    return output_weight(
        importance(reader, texts, config.seed, progress=progress),
        statistics.y_scale,
        [layer.width for layer in reader.target_geometry.layers] * 2,
    )


def gather(
    reader: Reader,
    documents: Sequence[Document],
    config: FitConfig,
    work: Workspace,
    *,
    progress: bool,
) -> Statistics:
    """Read anchors until `config.tokens` rows are gathered, in chunks of bounded memory.

    Of n processes each reads every n-th text, for an n-th of the rows; all get the sums of all.

    Raises:
        BadInput: the anchors run out before the features can be told apart.
    """
    statistics, first = _resumed(work)
    chunk: list[tuple[Tensor, Tensor]] = []
    pending = 0
    rank, processes = join()
    texts = _shuffled_windows(documents, config.seed)[rank::processes]
    wanted = config.tokens // processes
    done = statistics.rows if statistics else 0
    with tqdm(total=wanted, initial=done, unit="tok", desc="anchors", disable=not progress) as bar:
        for number, text in enumerate(texts[first:], first + 1):
            if done + pending >= wanted:
                break
            x, y = reader.pairs(text)
            chunk.append((x, y))
            pending += len(x)
            bar.update(len(x))
            if pending < CHUNK_ROWS and done + pending < wanted and number < len(texts):
                continue
            xs, ys = (torch.cat(parts) for parts in zip(*chunk, strict=True))
            if statistics is None and len(xs) >= CHUNK_ROWS:
                statistics = Statistics.start(xs, ys)
            if statistics is not None:
                statistics.add(xs, ys)
                chunk, done, pending = [], statistics.rows, 0
                work.save("statistics", statistics.tensors(), {"texts": number, "rows": done})
    if statistics is None:
        raise BadInput(
            "too few anchor tokens",
            found=f"{pending} usable tokens",
            expected=f"at least {CHUNK_ROWS}",
            remedy="give more anchors",
        )
    return statistics.all_reduce() if processes > 1 else statistics


def _resumed(work: Workspace) -> tuple[Statistics | None, int]:
    """The sums of a killed run, and how many texts are in them."""
    if (kept := work.load("statistics")) is None:
        return None, 0
    tensors, note = kept
    return Statistics(**tensors, rows=note["rows"]), note["texts"]


def _key(reader: Reader, documents: Sequence[Document], config: FitConfig) -> str:
    """What unfinished work belongs to: models, anchors and configuration."""
    parts = [reader.source_geometry.weights, reader.target_geometry.weights, digest(documents)]
    return json.dumps([*parts, asdict(config)])


def calibration_texts(
    documents: Sequence[Document], count: int, seed: int
) -> list[tuple[str, str]]:
    """Pairs of context and continuation: stretches of documents, recall texts between them."""
    cuts = (pair for text in _shuffled_windows(documents, seed + 1) if (pair := _cut(text)))
    recall = iter(recall_texts(count // (PROSE_PER_RECALL + 1), seed))
    pairs: list[tuple[str, str]] = []
    for pair in islice(cuts, count - count // (PROSE_PER_RECALL + 1)):
        pairs.append(pair)
        if len(pairs) % (PROSE_PER_RECALL + 1) == PROSE_PER_RECALL:
            pairs += islice(recall, 1)
    return [*pairs, *recall][:count]


def _cut(text: str) -> tuple[str, str] | None:
    """A context and what follows it, cut between words; None where there is no such place."""
    middle = text.rfind(" ", 0, CONTEXT_CHARACTERS)
    end = text.rfind(" ", 0, CONTEXT_CHARACTERS + CONTINUATION_CHARACTERS)
    enough = middle > CONTEXT_CHARACTERS // 2 and end > middle + CONTINUATION_CHARACTERS // 2
    return (text[:middle], text[middle:end]) if enough else None


def held_out_rows(
    reader: Reader, documents: Sequence[Document], seed: int
) -> tuple[Tensor, Tensor]:
    """Features [N, F] and target states [N, O] of a few texts of documents."""
    texts = _shuffled_windows(documents, seed)[:8]
    x, y = zip(*(reader.pairs(text) for text in texts), strict=True)
    return torch.cat(x), torch.cat(y)


def explained(
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


def _shuffled_windows(documents: Sequence[Document], seed: int) -> list[str]:
    texts = [text for document in documents for text in windows(document, WINDOW_CHARACTERS)]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
