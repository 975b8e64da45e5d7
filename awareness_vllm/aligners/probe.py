"""What a fit and its certification take here: a short measurement of machine and models."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.evaluate.certify import Extent, measure_texts
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.fit.budget import Speeds
from awareness_vllm.fit.calibrate import Training, kl_divergence
from awareness_vllm.fit.checkpoint import open_checkpoint
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.examples import CalibrationExamples, PairLessons
from awareness_vllm.fit.gather import CHUNK_ROWS, feature_count
from awareness_vllm.fit.importance import importance
from awareness_vllm.fit.layers import spread_layers
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.regress import IMPORTANCE_TEXTS
from awareness_vllm.fit.solve import OVERSAMPLING, RIDGE_TARGETS, RIDGES
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.fit.texts import calibration_texts, shuffled_windows
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

CONTEXT, CONTINUATION = 300, 60
SOLVE_SHARE = 0.25
"""Share of a budget for the regression, by which source layers are left out."""
ROWS, STEPS, SIDE = 800, 2, 1024
"""Anchor rows that are read, calibration steps that are done, and the side of the square matrices
whose factors and products are timed."""
SERVED = Extent(served=True)
"""What an alignment on demand is certified by."""
HELD_OUT_TEXTS = 8
"""Texts that are read for the ridge, and again for R²."""


@dataclass
class Stopwatch:
    """Seconds of named stretches."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun


def blank_map(reader: Reader, config: FitConfig) -> WMatrix:
    """A map of the shapes that a fit by this reader gives, of zeros: it takes as long to apply."""
    geometry, sink = reader.target_geometry, tuple(reader.sink)
    manifest = WMatrixManifest(
        source=reader.source_geometry,
        target=geometry,
        layers=reader.layers,
        rank=config.rank,
        predecessors=config.predecessors,
        residual=reader.residual,
        position_embeddings=tuple(sorted(reader.position_embeddings)),
        sink=sink,
        anchors=Anchors(digest="0" * 64, documents=0, tokens=0),
        fit={},
        r2={},
        versions={},
    )
    features = manifest.source_width + manifest.embedding_width
    states = [[torch.zeros(len(sink), g.heads, g.head_dim) for g in geometry.layers] for _ in "kv"]
    return WMatrix(
        manifest,
        mean=torch.zeros(features),
        scale=torch.full((features,), 1e-3),
        encode=torch.zeros(features, config.rank).bfloat16(),
        decode=torch.zeros(config.rank, geometry.width).bfloat16(),
        bias=torch.zeros(geometry.width),
        sink_keys=states[0],
        sink_values=states[1],
        position_embeddings=dict(reader.position_embeddings),
    )


def measure(
    reader: Reader,
    documents: Sequence[Document],
    texts: Sequence[Document],
    config: FitConfig,
    begun: float,
) -> Speeds:
    """What a fit of a configuration takes here, measured on a few anchors, texts and cases.

    Args:
        texts: of the certification, of which two are measured.
        begun: the time, by `time.monotonic`, at which the command began: all since is the probe's.
    """
    watch, wmatrix = Stopwatch(), blank_map(reader, config)
    row, text_rows = _reading(reader, documents, config, watch)
    step, weighed = _steps(reader, wmatrix, documents, config)
    text = _judging(reader, wmatrix, texts, config, watch)
    held_out = HELD_OUT_TEXTS * text_rows * row
    ridge, solve = Rates.measured(reader.device).solving(*_sizes(reader), config.rank)
    return Speeds(
        row=row + watch.seconds["save"] / CHUNK_ROWS,
        weighing=IMPORTANCE_TEXTS * weighed + held_out + ridge,
        solving=solve,
        step=step,
        scoring=held_out,
        loading=watch.seconds["load"],
        text=text,
        probe=time.monotonic() - begun,
    )


def _reading(
    reader: Reader, documents: Sequence[Document], config: FitConfig, watch: Stopwatch
) -> tuple[float, float]:
    """Seconds of an anchor's row, read and added; and rows of a text. Saving the sums is timed."""
    texts = shuffled_windows(documents, config.seed)
    reader.pairs([reader.tokeniser.text(texts[0])])  # the first pass makes what later ones use
    pairs, rows = [], 0
    with watch("read"):
        for text in texts[1:]:
            pairs.append(reader.pairs([reader.tokeniser.text(text)]))
            rows += len(pairs[-1][0])
            if rows >= ROWS:
                break
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    statistics = Statistics.start(x, y)
    statistics.add(x, y)  # allocates its sums
    with watch("add"):
        statistics.add(x, y)
    with watch("save"), open_checkpoint(None, "probe") as checkpoint:
        checkpoint.save("sums", statistics.tensors(), {})
    return (watch.seconds["read"] + watch.seconds["add"]) / rows, rows / len(pairs)


def _steps(
    reader: Reader, wmatrix: WMatrix, documents: Sequence[Document], config: FitConfig
) -> tuple[float, float]:
    """Seconds of a calibration step, and of the importance of one text."""
    lessons = PairLessons(tuple(calibration_texts(documents, STEPS, config.seed)))
    examples = CalibrationExamples(reader, wmatrix, lessons, None, config.batch)
    training, times = Training.start(examples.wmatrix), []
    begun = time.perf_counter()
    for _, batch in zip(range(1 + STEPS), examples.batches(examples.numbers(0, 0)), strict=False):
        training.optimizer.zero_grad()
        kl_divergence(examples.wmatrix, reader, training.parts, batch).backward()
        training.optimizer.step()
        times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    begun = time.perf_counter()
    importance(reader, lessons.pairs[:1], config.seed)
    return sum(times[1:]) / STEPS, time.perf_counter() - begun


def _judging(
    reader: Reader,
    wmatrix: WMatrix,
    texts: Sequence[Document],
    config: FitConfig,
    watch: Stopwatch,
) -> float:
    """Seconds of a text of a certification. Loading both models anew is timed, too."""
    with watch("load"):
        harness = EvalHarness(reader.source, reader.target, wmatrix, config.device)
        harness.packages(["The source is loaded now."])
    with watch("texts"):
        measure_texts(harness, texts, CONTEXT, CONTINUATION, 2, SERVED, progress=False)
    return watch.seconds["texts"] / 2


def choose_layers(reader: Reader, config: FitConfig, budget: float) -> int:
    """The number of source layers whose regression takes a SOLVE_SHARE of a budget at most: the
    configuration's, half of them by default, or fewer. The reader is set to read them."""
    total, rates = len(reader.source_geometry.layers), Rates.measured(reader.device)
    count = len(reader.layers)
    while count > 1 and not reader.residual:
        if sum(rates.solving(*_sizes(reader), config.rank)) <= SOLVE_SHARE * budget:
            break
        reader.choose(spread_layers(count := count // 2, total))
    return count


def _sizes(reader: Reader) -> tuple[int, int]:
    """Features and outputs of the reader's regression."""
    return feature_count(reader), reader.target_geometry.width


@dataclass(frozen=True)
class Rates:
    """Operations in a second of a `product`, a Cholesky `factor` and a `triangular` solution."""

    product: float
    factor: float
    triangular: float

    @classmethod
    def measured(cls, device: torch.device | str) -> Rates:
        """The rates for square matrices of SIDE columns."""
        matrix, cube = torch.randn(SIDE, SIDE, device=device), float(SIDE) ** 3
        gram = matrix @ matrix.T + SIDE * torch.eye(SIDE, device=device)
        return cls(
            _rate(2 * cube, lambda: matrix @ matrix),
            _rate(cube / 3, lambda: torch.linalg.cholesky(gram)),
            _rate(cube, lambda: torch.linalg.solve_triangular(gram, matrix, upper=True)),
        )

    def solving(self, features: int, outputs: int, rank: int) -> tuple[float, float]:
        """Seconds of choosing the ridge and of the regression, by the operations of each."""
        square, rank = float(features) ** 2, min(rank, features, outputs)
        factor = square * features / 3 / self.factor
        ridge = len(RIDGES) * (factor + 2 * square * RIDGE_TARGETS / self.triangular)
        products = 2 * features * outputs * (5 * (rank + OVERSAMPLING) + rank) + 4 * square * rank
        triangular = square * (outputs + rank) / self.triangular
        return ridge, factor + triangular + products / self.product


def _rate(operations: float, run: Callable[[], Tensor]) -> float:
    """Operations in a second, of the better of two runs."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return operations / min(times)
