"""Regression rows of texts: features of the source and the target, states of the target."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.fit.layers import spread_layers
from awareness_vllm.fit.tokens import TextTokens, Tokeniser, Workers
from awareness_vllm.kernels import rms_normalise
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.hf import load_model, padded_states, sink_ids
from awareness_vllm.models.position_embeddings import position_embeddings
from awareness_vllm.models.rope import Rotations
from awareness_vllm.wmatrix.features import flat_rows, masked_rows, with_position_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """The rows of one text: the target's `ids` with the sink first, `features` [T, F] float32,
    `masked` [T] bool, rows whose source states are masked, and `positions` [T], each row's target
    token, counted after the sink."""

    ids: list[int]
    features: Tensor
    masked: Tensor
    positions: Tensor


@dataclass
class Reader:
    """A source and a target model, in bfloat16: sums and gradients average its rounding away.

    Of the source, `count` layers are read, as `spread_layers` says; of a variant of the target all
    of them, since the map is then `residual`: it adds to them. Without `predecessors` there is a
    row for each source token but the first, otherwise for each target token. Learned positions
    are features too, `position_embeddings` by side. Models and rows are on the `device`; texts are
    tokenised by `workers`, of which there are none at first.
    """

    source: Path
    target: Path
    predecessors: int | None
    count: int | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.source_model: PreTrainedModel | None = None
        self.load_source()
        self.target_model = self.loaded(self.target)
        self.target_geometry = geometry_of(self.target)
        self.sink = sink_ids(self.target)
        self.tokeniser = self.make_tokeniser()
        self.workers = Workers(0, (self.tokeniser, None))
        self.residual = self.source_geometry.same_shape(self.target_geometry)
        total = len(self.source_geometry.layers)
        self.choose(spread_layers(total if self.residual else self.count, total))
        sides = {
            "source": (self.source_geometry, self.source_model),
            "target": (self.target_geometry, self.target_model),
        }
        self.position_embeddings = {
            side: position_embeddings(model)
            for side, (geometry, model) in sides.items()
            if geometry.additive and model is not None
        }

    def loaded(self, folder: Path) -> PreTrainedModel:
        """The model of a folder, which is not trained, on the device."""
        model = load_model(folder, torch.bfloat16).requires_grad_(False)
        model.to(device=self.device)  # type: ignore[call-arg]
        return model

    def load_source(self) -> None:
        """Load the source's model, and set its geometry."""
        self.source_model = self.loaded(self.source)
        self.source_geometry = geometry_of(self.source)

    def make_tokeniser(self) -> Tokeniser:
        """The tokeniser of texts for both models."""
        return Tokeniser(self.source, self.target, tuple(self.sink), self.predecessors)

    def source_states(self, texts: Sequence[TextTokens]) -> tuple[list[Tensor], list[Tensor]]:
        """The source's keys and values of texts, of all of its layers, [B, T, H, D] each."""
        assert self.source_model is not None
        return padded_states(self.source_model, [text.source for text in texts])

    def choose(self, layers: tuple[int, ...]) -> None:
        """Set the source layers to read."""
        self.layers = layers
        self.width = self.source_geometry.width_of(layers)

    def read(self, text: str) -> Row:
        """The rows of one text."""
        tokens = self.tokeniser.text(text)
        features, masked = self.features([tokens])
        return Row(tokens.ids, features, masked, torch.from_numpy(tokens.positions))

    @torch.no_grad()
    def features(self, texts: Sequence[TextTokens]) -> tuple[Tensor, Tensor]:
        """Features [M, F] float32 of the rows of several texts, read at once, one text after the
        other; and which rows' source states are masked, [M] bool."""
        index = torch.from_numpy(np.concatenate([text.index for text in texts]))
        keys, values = self.source_states(texts)
        own = at(index, [len(text) for text in texts], keys[0].shape[1]).to(self.device)
        keys, values = ([p[i].flatten(0, 1)[own] for i in self.layers] for p in (keys, values))
        schemes = [self.source_geometry.layers[i].positions for i in self.layers]
        flat = flat_rows(schemes, keys, values, Rotations(index, self.device))
        masked = torch.zeros(len(index), dtype=torch.bool)
        if self.predecessors is not None:
            flat = torch.cat((flat, self.embeddings(texts)), dim=1)
            masked = masked_rows(index)
        if self.position_embeddings:
            tables = {side: t.to(self.device) for side, t in self.position_embeddings.items()}
            positions = np.concatenate([text.positions for text in texts])
            where = torch.from_numpy(positions) + len(self.sink)
            sides = index.to(self.device), where.to(self.device)
            flat = with_position_embeddings(flat, tables, *sides)
        return flat, masked.to(self.device)

    def embeddings(self, texts: Sequence[TextTokens]) -> Tensor:
        """Normalised embeddings of each token and its predecessors, [M, (1 + predecessors) * E]:
        `embedding_features` of several texts."""
        assert self.predecessors is not None
        ids = torch.tensor([id for text in texts for id in text.ids], device=self.device)
        rows = rms_normalise(self.target_model.get_input_embeddings()(ids))
        rows = torch.cat((rows, torch.zeros_like(rows[:1])))  # before a text's first token: zeros
        sink, nothing, begin, columns = len(self.sink), len(ids), 0, []
        for text in texts:
            own = np.arange(sink, len(text.ids))[:, None] - np.arange(1 + self.predecessors)
            columns.append(np.where(own >= 0, own + begin, nothing))
            begin += len(text.ids)
        return rows[torch.from_numpy(np.concatenate(columns)).to(self.device)].flatten(1)

    @torch.no_grad()
    def pairs(self, texts: Sequence[TextTokens]) -> tuple[Tensor, Tensor]:
        """Features [M, F] and position-free target states [M, O] of the usable tokens of texts; of
        a variant, the difference of the target's states to the source's."""
        x, masked = self.features(texts)
        keys, values = padded_states(self.target_model, [text.ids for text in texts])
        positions = torch.from_numpy(np.concatenate([text.positions for text in texts]))
        positions = positions + len(self.sink)
        own = at(positions, [len(text) for text in texts], keys[0].shape[1]).to(self.device)
        keys, values = ([state.flatten(0, 1)[own] for state in p] for p in (keys, values))
        schemes = [layer.positions for layer in self.target_geometry.layers]
        y = flat_rows(schemes, keys, values, Rotations(positions, self.device))
        finite = x.isfinite().all(1) & y.isfinite().all(1)
        if not finite.all():
            _warn(texts, ~finite)
        usable = ~masked & finite
        x, y = x[usable], y[usable]
        return x, y - x[:, : self.width] if self.residual else y


def at(index: Tensor, lengths: Sequence[int], columns: int) -> Tensor:
    """The flat indices [M] of rows in a batch [B, columns], of their `index` [M] in each text, of
    which the first `lengths[0]` rows are in the first text, and so on."""
    texts = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return texts * columns + index


def _warn(texts: Sequence[TextTokens], unusable: Tensor) -> None:
    for text, rows in zip(texts, unusable.split([len(text) for text in texts]), strict=True):
        if rows.any():
            logger.warning(
                "%d tokens with NaN or infinite states are left out, of the text that begins %r",
                int(rows.sum()),
                text.text[:60],
            )
