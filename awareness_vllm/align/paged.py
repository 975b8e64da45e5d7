"""A W-Matrix on the KV cache's device: the fused operators, from package to pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.kernels import ops
from awareness_vllm.models.geometry import Positions
from awareness_vllm.models.rope import cos_sin_table
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.features import Embed, masked_rows, split_states
from awareness_vllm.wmatrix.file import WMatrix, check_plausible

WARM_UP_ROWS = 2048


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


@dataclass(frozen=True)
class Pages:
    """One layer's paged cache: keys and values [pages, page size, H, D] of any strides, and the
    factors from stored to real values."""

    keys: Tensor
    values: Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0


class PagedMap:
    """One W-Matrix's tensors on a device, narrowed to the layers and heads that live there.

    Args:
        heads: this rank's target layers, in order, and its KV heads of each.
        positions: the number of target positions in use.
    """

    def __init__(
        self,
        wmatrix: WMatrix,
        heads: Mapping[int, slice],
        positions: int,
        device: torch.device | str,
    ) -> None:
        self.manifest = wmatrix.manifest
        self.positions = positions
        self.device = torch.device(device)
        target = self.manifest.target
        outputs = split_states(target, torch.arange(target.width)[None])
        columns = torch.cat(
            [part[i][0, rank].flatten() for part in outputs for i, rank in heads.items()]
        )
        width = self.manifest.source_width + self.manifest.token_width
        self.mean, self.scale = wmatrix.mean[:width].to(device), wmatrix.scale[:width].to(device)
        self.encode = wmatrix.encode[:width].to(device).contiguous()
        # No latent is larger than this times its feature that lies furthest off.
        self.reach = self.encode.float().abs().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
        self.position_embeddings = wmatrix.position_latents()
        self.decode = wmatrix.decode[:, columns].to(device).contiguous()
        self.bias = wmatrix.bias[columns].to(device)
        self.sinks = [
            [states[i][:, rank].to(device) for i, rank in heads.items()]
            for states in (wmatrix.sink_keys, wmatrix.sink_values)
        ]
        self.cos_sin = self.cos_sin_tables([target.layers[i].positions for i in heads], positions)

    def cos_sin_tables(
        self, schemes: Sequence[Positions], count: int
    ) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Cosines and sines [count, C] of each layer's positions, and 1 where it is interleaved."""
        tables = [cos_sin_table(torch.arange(count), scheme) for scheme in schemes]
        cos, sin = ([part.to(self.device) for part in parts] for parts in zip(*tables, strict=True))
        return cos, sin, [int(scheme.interleaved) for scheme in schemes]

    @torch.inference_mode()
    def latent(self, package: Package, ids: list[int], source: Tensor, embed: Embed) -> Latent:
        """The latent of a package; `ids` and `source` are from `realign.sources`.

        Raises:
            PackageCorrupt: states that no model computes. The features are never in memory here:
                what their latent shows is less than `WMatrix.map` sees, but numbers that are not
                finite, or far too large.
        """
        keys, values = (
            [part[i].to(self.device) for i in self.manifest.layers]
            for part in (package.keys, package.values)
        )
        encoded = self._encode(keys, values, source, embed(torch.tensor(ids)))
        check_plausible(encoded / self.reach)
        rows = encoded.cpu()
        where = {"source": source, "target": torch.arange(len(self.manifest.sink), len(ids))}
        for side, latents in self.position_embeddings.items():
            rows += latents[where[side]]
        return Latent(ids, rows)

    def _encode(
        self, keys: list[Tensor], values: list[Tensor], source: Tensor, embeddings: Tensor
    ) -> Tensor:
        """The latent [T, R] of source tokens [T]; embeddings [S + T, E] are the target's."""
        manifest = self.manifest
        schemes = [manifest.source.layers[i].positions for i in manifest.layers]
        return ops.encode_states(
            keys,
            values,
            *self.cos_sin_tables(schemes, len(keys[0])),
            source.to(self.device),
            masked_rows(source).to(self.device),
            # Embedded already by the model: with tensor parallelism no rank has all rows.
            torch.arange(len(embeddings), device=self.device),
            embeddings.to(self.device),
            self.mean,
            self.scale,
            self.encode,
            -1 if manifest.predecessors is None else manifest.predecessors,
            len(manifest.sink),
        )

    @torch.inference_mode()
    def warm_up(self, pages: Sequence[Pages]) -> None:
        """Compile the operators and tune their tile sizes, on rows without slots."""
        source, sink = self.manifest.source, len(self.manifest.sink)
        dtype = getattr(torch, source.dtype)
        count = min(WARM_UP_ROWS, self.positions - sink)
        states = [
            torch.zeros(count, layer.heads, layer.head_dim, dtype=dtype, device=self.device)
            for layer in (source.layers[i] for i in self.manifest.layers)
        ]
        embeddings = torch.zeros(sink + count, self.manifest.target.hidden_size)
        nowhere = torch.full((len(embeddings),), -1)
        with ops.tuning(self.device):
            rows = self._encode(states, states, torch.arange(count), embeddings)
            latent = Latent([0] * len(embeddings), rows)
            self.write(latent, pages, [nowhere] * len(pages), begin=0)

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
                begin … begin+N-1, negative where nothing is to be written.
        """
        sink = len(self.manifest.sink)
        end = begin + len(slot_mapping[0])
        rows = latent.rows[max(0, begin - sink) : max(0, end - sink)]
        sinks = [[states[begin:end].contiguous() for states in part] for part in self.sinks]
        scales = [p.key_scale for p in pages] + [p.value_scale for p in pages]
        ops.decode_paged(
            rows.to(self.device),
            self.decode,
            self.bias,
            torch.arange(begin + offset, end + offset, device=self.device),
            *self.cos_sin,
            *sinks,
            [p.keys for p in pages],
            [p.values for p in pages],
            [s.to(self.device) for s in slot_mapping],
            torch.tensor(scales, device=self.device),
        )
