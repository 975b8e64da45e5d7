"""Representation alignment: the map by ridge regression, before calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import Tensor

from awareness_vllm.anchors.corpus import Document, digest
from awareness_vllm.fit.checkpoint import Checkpoint, open_checkpoint
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

IMPORTANCE_TEXTS = 12
IMPORTANCE_SEED = 2_000_000
"""Texts on which the importance of the target's states is measured; added to the fit's seed."""
CHOICE_TOKENS = 15_000
CHOICE_RIDGE = 0.02
"""Rows and ridge of the small regression that chooses the source layers."""


def regress(
    reader: Reader,
    documents: tuple[Sequence[Document], Sequence[Document]],
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool,
    until: float | None = None,
) -> WMatrix:
    """The map by ridge regression, from (training, held-out) documents; `until` as for `gather`."""
    statistics = gather(reader, documents[0], config, checkpoint, progress=progress, until=until)
    weight, ridge = weighting(reader, documents, statistics, config, checkpoint, progress=progress)
    return solve_map(reader, documents[0], statistics, weight, replace(config, ridge=ridge))


def choose_layers(
    reader: Reader,
    documents: Sequence[Document],
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool,
) -> None:
    """Set the reader's layers to those without which a small regression loses most."""
    if (saved := checkpoint.load("layers")) is not None:
        return reader.choose(tuple(saved[1]["layers"]))
    count = len(reader.layers)
    reader.choose(tuple(range(len(reader.source_geometry.layers))))
    few = replace(config, tokens=min(config.tokens, CHOICE_TOKENS))
    with open_checkpoint(None, "choice") as scratch:
        statistics = gather(reader, documents, few, scratch, progress=progress)
    weight = fisher_weight(reader, documents, statistics, config, progress=progress)
    elimination = Elimination(
        statistics, reader.source_geometry, weight, config.ridge or CHOICE_RIDGE
    )
    reader.choose(elimination.keep(count))
    say(f"source layers: {reader.layers}", progress)
    checkpoint.save("layers", {}, {"layers": reader.layers})


def weighting(
    reader: Reader,
    documents: tuple[Sequence[Document], Sequence[Document]],
    statistics: Statistics,
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool,
) -> tuple[Tensor, float]:
    """The parameters of the regression: the weight of each standardised target [O], the ridge."""
    if (saved := checkpoint.load("weighting")) is not None:
        return saved[0]["weight"].to(reader.device), saved[1]["ridge"]
    train, held_out = documents
    weight = fisher_weight(reader, train, statistics, config, progress=progress)
    ridge = config.ridge
    if ridge is None:
        x, y = held_out_rows(reader, held_out or train, config.seed)
        ridge = choose_ridge(statistics, x, y, weight, config.seed)
        say(f"ridge: {ridge}", progress)
    checkpoint.save("weighting", {"weight": weight}, {"ridge": ridge})
    return weight, ridge


def fisher_weight(
    reader: Reader,
    documents: Sequence[Document],
    statistics: Statistics,
    config: FitConfig,
    *,
    progress: bool,
) -> Tensor:
    """The weight of each standardised target [O], by the importance of its states."""
    texts = calibration_texts(documents, IMPORTANCE_TEXTS, config.seed + IMPORTANCE_SEED)
    return output_weight(
        importance(reader, texts, config.seed, progress=progress),
        statistics.y_std,
        [layer.width for layer in reader.target_geometry.layers] * 2,
    )


def solve_map(
    reader: Reader,
    train: Sequence[Document],
    statistics: Statistics,
    weight: Tensor,
    config: FitConfig,
) -> WMatrix:
    """The map of `config.rank` and `config.ridge`. Consumes the statistics."""
    assert config.ridge is not None
    tokens, mean, scale = statistics.rows, statistics.x_mean, 1 / statistics.x_std
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
    ).to("cpu")
