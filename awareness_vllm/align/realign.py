"""Aligned memories: a package's states as the target's cache, by a copy or by the learned map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.errors import BadInput, PackageCorrupt
from awareness_vllm.models.rope import rotate
from awareness_vllm.models.tokens import Tokens, align, load_tokenizer, tokenize
from awareness_vllm.packages.file import AnyPackage, Package, with_states
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.wmatrix.features import (
    Embed,
    embedding_features,
    flat_states,
    masked_rows,
    with_position_embeddings,
)
from awareness_vllm.wmatrix.file import WMatrix, check_plausible
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
    package: AnyPackage, manifest: WMatrixManifest, target: str | Path
) -> tuple[list[int], Tensor]:
    """The target's ids [S + T] of an aligned memory, the sink first, and the index [T] of the
    source token that each token's states are mapped from; of a latent, that of its row.

    A map that reads no tokens gives one row for each source token but the first, its sink; as
    placeholders their ids are the last of the target's sink.

    Raises:
        BadInput: the map reads tokens, and the package has no text.
        UnsupportedRequest: a sliding window has lost states that the map reads.
        PackageCorrupt: the ids of a latent are not the target's of its text.
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
    if isinstance(package, LatentPackage):
        check_tokens(package, tokens)
        return [*sink, *tokens.ids], torch.arange(len(tokens.ids))
    return [*sink, *tokens.ids], torch.from_numpy(align(package.spans, tokens.spans))


def check_tokens(package: LatentPackage, tokens: Tokens) -> None:
    """Check that a latent's rows are those of the target's `tokens` of its text.

    Raises:
        PackageCorrupt
    """
    if package.tokens != tokens.ids or not np.array_equal(package.spans, tokens.spans):
        raise PackageCorrupt(
            "the latent's tokens are not those of its text",
            found=f"{len(package.tokens)} other ids or spans",
            expected=f"the {len(tokens.ids)} that {package.info.target.name} has of the text",
            remedy="export the latent again with this version's tokenizer",
        )


def realign(
    package: AnyPackage,
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
        BadInput, UnsupportedRequest, PackageCorrupt: as `sources` and `Realignment` say.
    """
    ids, source = sources(package, wmatrix.manifest, target)
    work = Realignment(package, wmatrix, ids, source, embed, dtype=dtype, masked=masked)
    while not work.step():
        pass
    return work.memory


class Features:
    """What a map reads of a package, a block of tokens at a time.

    Args:
        ids, source: from `sources`.
        embed, masked: as for `realign`.
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
        masked: bool = False,
    ) -> None:
        manifest = wmatrix.manifest
        self.package, self.layers, self.masked = package, manifest.layers, masked
        self.source = source.to(wmatrix.encode.device)
        self.sink_rows = masked_rows(self.source)
        sink = len(manifest.sink)
        embeddings = embedding_features(embed, ids, sink, manifest.predecessors)
        self.embeddings = with_position_embeddings(
            embeddings, wmatrix.position_embeddings, self.source, torch.arange(sink, len(ids))
        )

    def block(self, part: slice) -> tuple[Tensor | None, Tensor, Tensor]:
        """The arguments of `WMatrix.map`, and of `WMatrix.latent`, for some of the tokens."""
        package, states = self.package, None
        if not self.masked:
            rows = self.source[part]
            states = flat_states(package.geometry, package.keys, package.values, rows, self.layers)
        return states, self.embeddings[part], self.sink_rows[part]


class Realignment:
    """`realign` in steps of one block, for callers with other work in between.

    Args:
        ids, source: from `sources`.
        embed, dtype, masked: as for `realign`.

    Raises:
        UnsupportedRequest: a latent, `masked`.
        PackageCorrupt: a latent that no states give.
    """

    @torch.inference_mode()
    def __init__(
        self,
        package: AnyPackage,
        wmatrix: WMatrix,
        ids: list[int],
        source: Tensor,
        embed: Embed,
        *,
        dtype: torch.dtype,
        masked: bool = False,
    ) -> None:
        manifest = wmatrix.manifest
        self.wmatrix, self.rows = wmatrix, len(source)
        self.input: Features | LatentPackage
        if isinstance(package, LatentPackage) and not masked:
            self.input = package
        else:
            self.input = Features(with_states(package), wmatrix, ids, source, embed, masked=masked)
        self.sink = len(manifest.sink)
        self.begin = 0
        shapes = [(len(ids), layer.heads, layer.head_dim) for layer in manifest.target.layers]
        keys, values = ([torch.empty(shape, dtype=dtype) for shape in shapes] for _ in range(2))
        for i in range(len(shapes)):
            keys[i][: self.sink] = wmatrix.sink_keys[i]
            values[i][: self.sink] = wmatrix.sink_values[i]
        self.memory = AlignedMemory(ids, keys, values)

    def mapped(self, block: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Position-free keys, and values, of a block of tokens. Raises PackageCorrupt."""
        if isinstance(self.input, LatentPackage):
            return self.wmatrix.states(latent_rows(self.input, self.wmatrix, block))
        return self.wmatrix.map(*self.input.block(block))

    @torch.inference_mode()
    def step(self) -> bool:
        """Align the next block of tokens; whether the memory is complete.

        Raises:
            PackageCorrupt: states, or images of theirs, that are not plausible.
        """
        end = min(self.begin + BLOCK, self.rows)
        free, mapped = self.mapped(slice(self.begin, end))
        # Assigning into a slice casts without another copy.
        rows = slice(self.sink + self.begin, self.sink + end)
        positions = torch.arange(rows.start, rows.stop)
        for i, layer in enumerate(self.wmatrix.manifest.target.layers):
            self.memory.keys[i][rows] = rotate(free[i], positions, layer.positions)
            self.memory.values[i][rows] = mapped[i]
        self.begin = end
        return self.begin >= self.rows


def latent_rows(package: LatentPackage, wmatrix: WMatrix, block: slice) -> Tensor:
    """A block [T, R] of the latent that a package holds for this map, of its dtype and on its
    device.

    Raises:
        PackageCorrupt: one that no states give.
    """
    # A number may be finite in the file, and not in the map's dtype.
    rows = package.rows(block).to(wmatrix.encode.device, wmatrix.encode.dtype)
    check_plausible(rows / wmatrix.reach)
    return rows
