"""Regression rows of texts: features of the source and the target, states of the target."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awareness_vllm.fit.layers import spread_layers
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.hf import inputs_after, last_logits, load_model, sink_ids, states
from awareness_vllm.models.position_embeddings import position_embeddings
from awareness_vllm.models.rope import rotate
from awareness_vllm.models.tokens import align, load_tokenizer, tokenize
from awareness_vllm.packages.capture import read_tokens
from awareness_vllm.wmatrix.features import (
    embedding_features,
    flat_states,
    masked_rows,
    split_states,
    with_position_embeddings,
)

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
    are features too, `position_embeddings` by side.
    """

    source: Path
    target: Path
    predecessors: int | None
    count: int | None = None

    def __post_init__(self) -> None:
        self.source_model = load_model(self.source, torch.bfloat16).requires_grad_(False)
        self.target_model = load_model(self.target, torch.bfloat16).requires_grad_(False)
        self.source_geometry = geometry_of(self.source)
        self.target_geometry = geometry_of(self.target)
        self.sink = sink_ids(self.target)
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
            if geometry.additive
        }

    def choose(self, layers: tuple[int, ...]) -> None:
        """Set the source layers to read."""
        self.layers = layers
        self.width = self.source_geometry.width_of(layers)

    @torch.no_grad()
    def read(self, text: str) -> Row:
        """The rows of one text."""
        source = read_tokens(self.source, text)
        target = tokenize(load_tokenizer(str(self.target)), text)
        ids = [*self.sink, *target.ids]
        keys, values = states(self.source_model, source.ids)
        flat = flat_states(self.source_geometry, keys, values, layers=self.layers)
        if self.predecessors is None:
            positions = torch.from_numpy(align(target.spans, source.spans[1:]))
            index = torch.arange(1, len(flat))
            features = with_position_embeddings(
                flat[1:], self.position_embeddings, index, positions + len(self.sink)
            )
            return Row(ids, features, torch.zeros(len(positions), dtype=torch.bool), positions)
        index = torch.from_numpy(align(source.spans, target.spans))
        embed = self.target_model.get_input_embeddings()
        e = embedding_features(embed, ids, len(self.sink), self.predecessors)
        positions = torch.arange(len(index))
        features = torch.cat((flat[index], e), dim=1)
        features = with_position_embeddings(
            features, self.position_embeddings, index, positions + len(self.sink)
        )
        return Row(ids, features, masked_rows(index), positions)

    @torch.no_grad()
    def pairs(self, text: str) -> tuple[Tensor, Tensor]:
        """Features [T, F] and position-free target states [T, O] of a text's usable tokens; of a
        variant, the difference of the target's states to the source's."""
        row = self.read(text)
        truth = flat_states(self.target_geometry, *states(self.target_model, row.ids))
        y = truth[len(self.sink) :][row.positions]
        finite = row.features.isfinite().all(1) & y.isfinite().all(1)
        if not finite.all():
            logger.warning(
                "%d tokens with NaN or infinite states are left out, of the text that begins %r",
                int((~finite).sum()),
                text[:60],
            )
        usable = ~row.masked & finite
        x, y = row.features[usable], y[usable]
        return x, y - x[:, : self.width] if self.residual else y

    def logits_after(
        self, sinks: tuple[list[Tensor], list[Tensor]], flat: Tensor, ids: list[int]
    ) -> Tensor:
        """The target's logits at ids that follow a memory, [len(ids), V], differentiable in it.

        Args:
            sinks: keys and values of the sink, per layer [S, H, D] as cached.
            flat: [T, O], the memory's states after it, keys position-free.
        """
        free, values = split_states(self.target_geometry, flat)
        positions = torch.arange(len(self.sink), len(self.sink) + len(flat))
        layers = zip(free, self.target_geometry.layers, strict=True)
        rotated = [rotate(key, positions, layer.positions) for key, layer in layers]
        keys, values = (
            [torch.cat((sink.float(), state.float())) for sink, state in zip(*part, strict=True)]
            for part in zip(sinks, (rotated, values), strict=True)
        )
        inputs = inputs_after(keys, values, ids, torch.bfloat16)
        return last_logits(self.target_model, ids, len(ids), **inputs)
