"""Fit a W-Matrix: both models read the anchors, a reduced-rank ridge learns the map between them."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.align.features import blank_rows, embedding_features, flat_states
from awareness_vllm.anchors.corpus import Document, digest, split, windows
from awareness_vllm.anchors.spans import align, load_tokenizer, prefix_ids, tokenize
from awareness_vllm.errors import BadInput
from awareness_vllm.geometry import Geometry, resolve_folder
from awareness_vllm.packages.capture import load_model, read_tokens, states
from awareness_vllm.wmatrix.file import Anchors, WMatrix, WMatrixManifest
from awareness_vllm.wmatrix.solve import reduced_rank_ridge
from awareness_vllm.wmatrix.statistics import Statistics

WINDOW_CHARACTERS = 2400
CHUNK_ROWS = 2048
HELD_OUT = 0.05


@dataclass(frozen=True)
class FitConfig:
    """`tokens` of anchors (target tokens), latent `rank`, `ridge` as a share of unit variance,
    and how many `predecessors` of a token lend their embeddings."""

    tokens: int = 60_000
    rank: int = 1024
    ridge: float = 0.02
    predecessors: int = 3
    seed: int = 0


@dataclass
class Reader:
    """Both models reading the same text; bfloat16, since statistics average its rounding away."""

    source: Path
    target: Path
    predecessors: int

    def __post_init__(self) -> None:
        self.source_model = load_model(self.source, torch.bfloat16)
        self.target_model = load_model(self.target, torch.bfloat16)
        self.source_geometry = Geometry.from_folder(self.source)
        self.target_geometry = Geometry.from_folder(self.target)
        self.sink = sink_ids(self.target)

    @torch.inference_mode()
    def rows(self, text: str) -> tuple[Tensor, Tensor]:
        """Features [T, F] and position-free target states [T, O] of one text, float32."""
        source = read_tokens(self.source, text)
        target = tokenize(load_tokenizer(str(self.target)), text)
        index = align(source.spans, target.spans)
        ids = [*self.sink, *target.ids]
        y = flat_states(self.target_geometry, *states(self.target_model, ids))[len(self.sink) :]
        flat = flat_states(self.source_geometry, *states(self.source_model, source.ids))
        embed = self.target_model.get_input_embeddings()
        e = embedding_features(embed, ids, len(self.sink), self.predecessors)
        x = torch.cat((flat[torch.from_numpy(index)], e), dim=1)
        usable = ~blank_rows(index) & x.isfinite().all(1) & y.isfinite().all(1)
        return x[usable], y[usable]


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
    reader = Reader(resolve_folder(source), resolve_folder(target), config.predecessors)
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
            x, y = reader.rows(text)
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


def explained(reader: Reader, wmatrix: WMatrix, documents: Sequence[Document]) -> dict[str, float]:
    """R² of keys and of values on documents that the map has not seen, each output of weight one."""
    width, half = reader.source_geometry.width, reader.target_geometry.key_width
    parts = []
    for text in _shuffled_windows(documents, wmatrix.manifest.seed)[:8]:
        x, y = reader.rows(text)
        keys, values = wmatrix.map(x[:, :width], x[:, width:])
        parts.append((y, torch.cat([s.flatten(1) for s in (*keys, *values)], dim=1)))
    if not parts:
        return {}
    y, predicted = (torch.cat(p) for p in zip(*parts, strict=True))
    share = 1 - (y - predicted).square().mean(0) / y.var(0).clamp_min(1e-12)
    return {"keys": share[:half].mean().item(), "values": share[half:].mean().item()}


def sink_ids(target: Path) -> list[int]:
    """The target's fixed first tokens: what its tokenizer puts first, else its BOS, else token 0."""
    ids = prefix_ids(load_tokenizer(str(target)))
    if ids:
        return ids
    bos = json.loads((target / "config.json").read_text()).get("bos_token_id")
    return [bos if isinstance(bos, int) else 0]


def sink_states(folder: Path, sink: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The target's own states of its first tokens, exact, [S, H, D] float32."""
    return states(load_model(folder), sink)


def _shuffled_windows(documents: Sequence[Document], seed: int) -> list[str]:
    texts = [text for document in documents for text in windows(document, WINDOW_CHARACTERS)]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
