"""From a memory package to the target's own cache entries: a copy, or the learned map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awareness_vllm.align.features import (
    Embed,
    blank_rows,
    embedding_features,
    flat_states,
    with_places,
)
from awareness_vllm.anchors.spans import align, load_tokenizer, tokenize
from awareness_vllm.errors import BadInput
from awareness_vllm.packages.file import Package
from awareness_vllm.positions import apply
from awareness_vllm.wmatrix.file import WMatrix, WMatrixManifest

TAIL = 16
"""Last tokens of a realigned memory that the target reads itself, by default, after the rest: what
is asked follows them at once, and they bring more retention than anything else at their price
(docs/fidelity-log.md). More of them bring more, and take longer (`awareness serve --tail`)."""
BLOCK = 512
"""Tokens aligned at once: large enough for the matrix products, small enough that the working
memory is reused instead of being asked of the kernel anew, page by page."""


@dataclass(frozen=True)
class AlignedMemory:
    """Target-side KV at positions 0 … T-1: `keys[i]` and `values[i]` are [T, H, D] as cached."""

    ids: list[int]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


def copy(package: Package) -> AlignedMemory:
    """A memory for the model that made it: the captured states, bit for bit."""
    package.manifest.check_whole(range(len(package.keys)))
    return AlignedMemory(package.tokens, package.keys, package.values)


def prompt_ids(text: str, sink: Sequence[int], target: str | Path) -> list[int]:
    """The target's ids of an aligned memory: the sink, then the target's own tokens of the text."""
    return [*sink, *tokenize(load_tokenizer(str(target)), text).ids]


def sources(
    package: Package, manifest: WMatrixManifest, target: str | Path
) -> tuple[list[int], Tensor]:
    """The target's ids [S + T] of an aligned memory, the sink first, and for each token the
    source's [T] that its states are mapped from.

    A map that reads no tokens gives one row for each of the source's but the first, its sink; their
    ids are the target's sink again, which says nothing.

    Raises:
        BadInput: the map reads tokens, and the package has no text;
        UnsupportedRequest: the map reads layers whose window has lost states of the memory.
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


@torch.inference_mode()
def realign(
    package: Package,
    wmatrix: WMatrix,
    target: str | Path,
    embed: Embed,
    *,
    dtype: torch.dtype,
    blank: bool = False,
) -> AlignedMemory:
    """A memory for another model, through its W-Matrix.

    Args:
        target: the target's folder, for its tokenizer.
        embed: the target's own embedding.
        dtype: of the target's cache.
        blank: hide the source's states (the tokens-only arm).
    """
    manifest = wmatrix.manifest
    ids, source = sources(package, manifest, target)
    blanked = blank_rows(source)
    sink = len(manifest.sink)
    embeddings = embedding_features(embed, ids, sink, manifest.predecessors)
    positions = torch.arange(sink, len(ids))
    embeddings = with_places(embeddings, wmatrix.places, source, positions)
    layers = manifest.target.layers
    shapes = [(len(ids), layer.heads, layer.head_dim) for layer in layers]
    keys, values = ([torch.empty(shape, dtype=dtype) for shape in shapes] for _ in range(2))
    for i in range(len(layers)):
        keys[i][:sink], values[i][:sink] = wmatrix.sink_keys[i], wmatrix.sink_values[i]
    for begin in range(0, len(positions), BLOCK):
        block = slice(begin, begin + BLOCK)
        states = (
            None
            if blank
            else flat_states(
                package.geometry, package.keys, package.values, source[block], manifest.layers
            )
        )
        free, mapped = wmatrix.map(states, embeddings[block], blanked[block])
        # Assigning casts and places at once: no copy is made that is not kept.
        placed = slice(sink + begin, sink + begin + len(mapped[0]))
        for i, layer in enumerate(layers):
            keys[i][placed] = apply(free[i], positions[block], layer.positions)
            values[i][placed] = mapped[i]
    return AlignedMemory(ids, keys, values)
