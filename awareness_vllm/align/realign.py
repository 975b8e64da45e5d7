"""Aligned memories: a package's states as the target's cache, by a copy or by the learned map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awareness_vllm.errors import BadInput
from awareness_vllm.models.rope import rotate
from awareness_vllm.models.tokens import align, load_tokenizer, tokenize
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.features import (
    Embed,
    embedding_features,
    flat_states,
    masked_rows,
    with_position_embeddings,
)
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import WMatrixManifest

BLOCK = 512
"""Tokens aligned at once: enough for efficient matrix products, few enough that the allocator
reuses the working memory instead of mapping new pages."""


@dataclass(frozen=True)
class AlignedMemory:
    """Target-side KV at positions 0 … T-1: `keys[i]` and `values[i]` are [T, H, D] as cached. A
    layer with a window may have the last rows only: those that later tokens can see."""

    ids: list[int]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


def copy(package: Package) -> AlignedMemory:
    """The memory of a package on its own model: the captured states, bit for bit.

    Raises:
        UnsupportedRequest: a sliding window has lost states.
    """
    package.manifest.check_whole(range(len(package.keys)))
    return AlignedMemory(package.tokens, package.keys, package.values)


def prompt_ids(text: str, sink: Sequence[int], target: str | Path) -> list[int]:
    """The target's ids of an aligned memory: the sink, then the target's own tokens of the text."""
    return [*sink, *tokenize(load_tokenizer(str(target)), text).ids]


def sources(
    package: Package, manifest: WMatrixManifest, target: str | Path
) -> tuple[list[int], Tensor]:
    """The target's ids [S + T] of an aligned memory, the sink first, and the index [T] of the
    source token that each token's states are mapped from.

    A map that reads no tokens gives one row for each source token but the first, its sink; as
    placeholders their ids are the last of the target's sink.

    Raises:
        BadInput: the map reads tokens, and the package has no text.
        UnsupportedRequest: a sliding window has lost states that the map reads.
    """
    package.manifest.check_whole(manifest.layers)
    sink = manifest.sink
    if manifest.predecessors is None:
        source = torch.arange(1, package.manifest.tokens)
        return [*sink, *(sink[-1:] * len(source))], source
    if not package.manifest.has_text:
        raise BadInput(
            "the W-Matrix needs the memory's text",
            found="a package without text",
            expected="a W-Matrix that reads the source's states alone",
            remedy="fit one with `awareness fit --without-text`",
        )
    tokens = tokenize(load_tokenizer(str(target)), package.text)
    return [*sink, *tokens.ids], torch.from_numpy(align(package.spans, tokens.spans))


def realign(
    package: Package,
    wmatrix: WMatrix,
    target: str | Path,
    embed: Embed,
    *,
    dtype: torch.dtype,
    masked: bool = False,
) -> AlignedMemory:
    """The memory of a package on another model, through a W-Matrix.

    Args:
        target: the target's folder, for its tokenizer.
        embed: the target's own embedding.
        dtype: of the target's cache.
        masked: whether the source's states are masked (the tokens-only arm).

    Raises:
        BadInput, UnsupportedRequest: as `sources` says.
    """
    ids, source = sources(package, wmatrix.manifest, target)
    work = Realignment(package, wmatrix, ids, source, embed, dtype=dtype, masked=masked)
    while not work.step():
        pass
    return work.memory


class Realignment:
    """`realign` in steps of one block, for callers with other work in between.

    Args:
        ids, source: from `sources`.
        embed, dtype, masked: as for `realign`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        package: Package,
        wmatrix: WMatrix,
        ids: list[int],
        source: Tensor,
        embed: Embed,
        *,
        dtype: torch.dtype,
        masked: bool = False,
    ) -> None:
        manifest = wmatrix.manifest
        source = source.to(wmatrix.encode.device)
        self.package, self.wmatrix, self.source, self.masked = package, wmatrix, source, masked
        self.sink_rows = masked_rows(source)
        self.sink = len(manifest.sink)
        positions = torch.arange(self.sink, len(ids))
        embeddings = embedding_features(embed, ids, self.sink, manifest.predecessors)
        self.embeddings = with_position_embeddings(
            embeddings, wmatrix.position_embeddings, source, positions
        )
        self.begin = 0
        shapes = [(len(ids), layer.heads, layer.head_dim) for layer in manifest.target.layers]
        keys, values = ([torch.empty(shape, dtype=dtype) for shape in shapes] for _ in range(2))
        for i in range(len(shapes)):
            keys[i][: self.sink] = wmatrix.sink_keys[i]
            values[i][: self.sink] = wmatrix.sink_values[i]
        self.memory = AlignedMemory(ids, keys, values)

    @torch.inference_mode()
    def step(self) -> bool:
        """Align the next block of tokens; whether the memory is complete.

        Raises:
            PackageCorrupt: states, or images of theirs, that are not plausible.
        """
        package, manifest = self.package, self.wmatrix.manifest
        block = slice(self.begin, self.begin + BLOCK)
        source = self.source[block]
        states = (
            None
            if self.masked
            else flat_states(
                package.geometry, package.keys, package.values, source, manifest.layers
            )
        )
        free, mapped = self.wmatrix.map(states, self.embeddings[block], self.sink_rows[block])
        # Assigning into a slice casts without another copy.
        positions = torch.arange(len(source)) + self.sink + self.begin
        rows = slice(self.sink + self.begin, self.sink + self.begin + len(source))
        for i, layer in enumerate(manifest.target.layers):
            self.memory.keys[i][rows] = rotate(free[i], positions, layer.positions)
            self.memory.values[i][rows] = mapped[i]
        self.begin += BLOCK
        return self.begin >= len(self.source)
