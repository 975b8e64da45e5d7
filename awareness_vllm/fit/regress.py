"""Representation alignment: the map by ridge regression alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import Tensor

from awareness_vllm.anchors.corpus import Document, digest
from awareness_vllm.fit.checkpoint import Checkpoint, workspace
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.gather import gather, held_out_rows
from awareness_vllm.fit.importance import importance, output_weight
from awareness_vllm.fit.layers import Elimination
from awareness_vllm.fit.progress import say
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.solve import choose_ridge, reduced_rank_ridge, round_trip_error
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.fit.texts import calibration_texts
from awareness_vllm.models.hf import sink_states
from awareness_vllm.provenance import versions
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

JUDGING_TEXTS = 12
"""Texts on which the importance of the target's states is measured."""
JUDGING_SEED = 2_000_000
CHOICE_TOKENS = 15_000
CHOICE_RIDGE = 0.02
"""Rows and ridge of the small regression that chooses the source's layers."""


def regress(
    reader: Reader,
    documents: tuple[Sequence[Document], Sequence[Document]],
    config: FitConfig,
    work: Checkpoint,
    *,
    progress: bool,
) -> WMatrix:
    """The map by ridge regression alone, on (training, held-out) documents."""
    statistics = gather(reader, documents[0], config, work, progress=progress)
    weight, ridge = weighting(reader, documents, statistics, config, work, progress=progress)
    return solved(reader, documents[0], statistics, weight, replace(config, ridge=ridge))


def choose_layers(
    reader: Reader,
    documents: Sequence[Document],
    config: FitConfig,
    work: Checkpoint,
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


def weighting(
    reader: Reader,
    documents: tuple[Sequence[Document], Sequence[Document]],
    statistics: Statistics,
    config: FitConfig,
    work: Checkpoint,
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
            position_embeddings=tuple(sorted(reader.position_embeddings)),
            sink=tuple(reader.sink),
            anchors=Anchors(digest=digest(train), documents=len(train), tokens=tokens),
            fit=asdict(config),
            r2={},
            reconstruction_error=error,
            versions=versions(),
        ),
        mean=mean,
        scale=scale,
        encode=encode.bfloat16(),
        decode=decode.bfloat16(),
        bias=bias,
        sink_keys=sink_keys,
        sink_values=sink_values,
        position_embeddings=dict(reader.position_embeddings),
    )
