"""A W-Matrix on the KV cache's device: the fused operators, from package to pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.align.footprint import Footprint, chunk_rows
from awareness_vllm.align.workspace import DeviceWorkspace, Staging
from awareness_vllm.kernels import ops
from awareness_vllm.wmatrix.features import masked_rows, split_states
from awareness_vllm.wmatrix.file import WMatrix, check_plausible


@dataclass(frozen=True)
class Latent:
    """An encoded memory: the target's `ids` [S + T], and `rows` [T, R] on the host, which are
    decoded directly into pages. It is a fraction of the states' size, so more memories stay
    warm."""

    ids: list[int]
    rows: Tensor

    @property
    def bytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()


Scale = float | Sequence[float]
"""A layer's factor from stored to real values, or one for each of its heads here."""


@dataclass(frozen=True)
class Pages:
    """One layer's paged cache: keys and values [pages, page size, H, D] of any strides, and the
    factors from stored to real values."""

    keys: Tensor
    values: Tensor
    key_scale: Scale = 1.0
    value_scale: Scale = 1.0


class PagedMap:
    """One W-Matrix's tensors on a device, narrowed to the layers and heads that live there.

    Args:
        heads: this rank's target layers, in order, and its KV heads of each.
        workspace: of the device; its maps share it.
    """

    def __init__(
        self, wmatrix: WMatrix, heads: Mapping[int, slice], workspace: DeviceWorkspace
    ) -> None:
        self.manifest, self.workspace = wmatrix.manifest, workspace
        device = self.device = workspace.device
        target = self.manifest.target
        outputs = split_states(target, torch.arange(target.width)[None])
        columns = torch.cat(
            [part[i][0, rank].flatten() for part in outputs for i, rank in heads.items()]
        )
        width = self.manifest.source_width + self.manifest.token_width
        self.mean, self.scale = wmatrix.mean[:width].to(device), wmatrix.scale[:width].to(device)
        self.encode = wmatrix.encode[:width].to(device).contiguous()
        self.reach = wmatrix.reach.to(device)
        self.position_embeddings = wmatrix.position_latents()
        self.decode = wmatrix.decode[:, columns].to(device).contiguous()
        self.bias = wmatrix.bias[columns].to(device)
        self.sinks = [
            [states[i][:, rank].to(device) for i, rank in heads.items()]
            for states in (wmatrix.sink_keys, wmatrix.sink_values)
        ]
        self.schemes = [target.layers[i].positions for i in heads]
        tables = [workspace.rotations.table(scheme) for scheme in self.schemes]
        self.cos_sin = [list(part) for part in zip(*tables, strict=True)]
        self.chunk_rows = chunk_rows(self.manifest)
        size = Footprint.of(self.manifest, heads, self.encode.element_size())
        workspace.reserve(size.chunk, size.write)

    @property
    def rank(self) -> int:
        """The width R of a latent."""
        return self.encode.shape[1]

    def encode_rows(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        cos_sin: Sequence[tuple[Tensor, Tensor]],
        index: Tensor,
        source: Tensor,
        embeddings: Tensor,
        before: int,
        out: Tensor,
    ) -> None:
        """The latent [T, R] of source tokens [T], copied into `out` on the host.

        Args:
            keys, values, cos_sin: per source layer that is read, on the device, of the tokens that
                `index` [T] points into.
            embeddings: [before + T, E], the target's; the first `before` rows are predecessors.

        Raises:
            PackageCorrupt: states that no model computes.
        """
        cos, sin = ([pair[i] for pair in cos_sin] for i in range(2))
        layers = [self.manifest.source.layers[i] for i in self.manifest.layers]
        encoded = ops.encode_states(
            keys,
            values,
            cos,
            sin,
            [int(layer.positions.interleaved) for layer in layers],
            index,
            masked_rows(source),
            # Embedded already by the model: with tensor parallelism no rank has all rows.
            torch.arange(len(embeddings)),
            embeddings,
            self.mean,
            self.scale,
            self.encode,
            -1 if self.manifest.predecessors is None else self.manifest.predecessors,
            before,
        )
        check_plausible(encoded / self.reach)
        out.copy_(encoded)

    @torch.inference_mode()
    def write(
        self,
        latent: Latent,
        pages: Sequence[Pages],
        slot_mapping: Sequence[Tensor],
        begin: int,
        offset: int = 0,
    ) -> None:
        """Decode a memory's tokens from `begin` on into pages, moved by `offset` positions; its
        sink, whose states are as cached, is not moved.

        Args:
            pages, slot_mapping: per layer of this rank; slots [N] int64 of tokens
                begin … begin+N-1, negative where nothing is to be written. Layers of one KV cache
                group have the same tensor, which goes up once.
        """
        end = begin + len(slot_mapping[0])
        for first in range(begin, end, self.chunk_rows):
            last = min(end, first + self.chunk_rows)
            part = slice(first - begin, last - begin)
            slots = {id(group): group[part] for group in slot_mapping}
            by_layer = [slots[id(group)] for group in slot_mapping]
            self.write_chunk(
                latent, pages, by_layer, first, offset, next(self.workspace.next_write)
            )

    def write_chunk(
        self,
        latent: Latent,
        pages: Sequence[Pages],
        slot_mapping: Sequence[Tensor],
        begin: int,
        offset: int,
        staging: Staging,
    ) -> None:
        """`write` of at most `chunk_rows` tokens, uploaded through a staging buffer."""
        sink = len(self.manifest.sink)
        end = begin + len(slot_mapping[0])
        host_rows = latent.rows[max(0, begin - sink) : max(0, end - sink)]
        sides = [(p.key_scale, p.keys) for p in pages] + [(p.value_scale, p.values) for p in pages]
        rows, scales = staging.upload([host_rows, scale_table(sides)])
        staging.begin_use()
        ops.decode_paged(
            rows,
            self.decode,
            self.bias,
            torch.arange(begin + offset, end + offset),
            *self.cos_sin,
            [int(scheme.interleaved) for scheme in self.schemes],
            *[[states[begin:end].contiguous() for states in part] for part in self.sinks],
            [p.keys for p in pages],
            [p.values for p in pages],
            slot_mapping,
            scales,
        )
        staging.end_use()


def scale_table(sides: Sequence[tuple[Scale, Tensor]]) -> Tensor:
    """The factors of states [..., H, D] in float32 on the host: one for each of them, or, where one
    has several, one for each of all their heads."""
    if all(isinstance(scale, float) for scale, _ in sides):
        return torch.tensor([scale for scale, _ in sides], dtype=torch.float32)
    by_head = [
        [scale] * states.shape[2] if isinstance(scale, float) else list(scale)
        for scale, states in sides
    ]
    return torch.tensor([factor for heads in by_head for factor in heads], dtype=torch.float32)
