"""Two W-Matrices, A → B and B → C, folded into one A → C that costs what a direct one does.

Both maps are linear in standardised features, so their composition is one matrix product, and the
second map's latent is its bottleneck: the folded map has the second's rank. What is between the
first latent and the second one is either

- *the algebra*: decode of the first, standardise and encode of the second, multiplied out. It is
  the chain of both maps, to float32 rounding, where the first map makes nothing of B's tokens and
  B and C cut texts in the same places. Elsewhere it leaves B's embeddings at their mean (features
  are standardised, so leaving them out is that), and reads A at the last byte of C's token instead
  of at that of the B-token around it, which may end later. B's rounding in between is left out.
- *or a bridge*, learned over texts that A and B read: a regression of the second latent's share of
  B's true states on the first latent's share of A's and on C's embeddings. The chain is no better
  than the first map's worst outputs: what B does not feel (a key's dim of hardly any spread) is
  left to chance by the first map, and blown up by the second, which standardises it. Between two
  calibrated maps that ruined all (docs/design.md); the regression trusts each direction of the
  first latent as far as it has proven right, and makes up for B's tokens by C's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput, NoWMatrix, UnsupportedModel
from awareness_vllm.fit.solve import leading_right_vectors, reduced_rank_ridge
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.fit.texts import shuffled_windows
from awareness_vllm.models.hf import states
from awareness_vllm.models.tokens import Spans, align, load_tokenizer, tokenize
from awareness_vllm.packages.capture import read_tokens
from awareness_vllm.provenance import versions
from awareness_vllm.wmatrix.features import (
    Embed,
    embedding_features,
    flat_states,
    masked_rows,
    split_states,
)
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BRIDGE_TOKENS = 20_000
BRIDGE_CHUNK = 4096
"""Rows that a bridge is learned from, and how many are summed at once."""
BRIDGE_RIDGE = 0.02
"""As in the fit: a share of the features' unit variance (docs/fidelity-log.md)."""


@dataclass(frozen=True)
class Bridge:
    """From the first latent's share of A's states, `states` [R1, R2], and from C's standardised
    token features, `tokens` [E2, R2], to the second latent's share of B's states, short of `bias`
    [R2]; learned on so many `rows` (0: it is the algebra)."""

    states: Tensor
    tokens: Tensor
    bias: Tensor
    rows: int = 0


def compose(
    first: WMatrix, second: WMatrix, *, bridge: Bridge | None = None, rank: int | None = None
) -> WMatrix:
    """One map that gives what `second` makes of what `first` gives; nobody has measured it yet.

    Args:
        bridge: from `learn_bridge`; without, the algebra.
        rank: of the result, by default the second's. Only where the second adds to the states that
            it is given (`residual`) does the composition have more: the sum of both.

    Raises:
        NoWMatrix, UnsupportedModel: as `check_consecutive` says.
    """
    check_consecutive(first, second)
    encode, decode, bias = composed(first, second, bridge)
    encode, decode = cut(encode, decode, rank or second.manifest.rank)
    mean, scale = (
        torch.cat((a[: first.manifest.source_width], b[second.manifest.source_width :]))
        for a, b in ((first.mean, second.mean), (first.scale, second.scale))
    )
    return WMatrix(
        manifest_of(first, second, len(decode), bridge),
        mean=mean,
        scale=scale,
        encode=encode.to(second.encode.dtype),
        decode=decode.to(second.decode.dtype),
        bias=bias,
        sink_keys=second.sink_keys,
        sink_values=second.sink_values,
    )


def check_consecutive(first: WMatrix, second: WMatrix) -> None:
    """Prove that two maps can be one.

    Raises:
        NoWMatrix: the second does not begin where the first ends.
        UnsupportedModel: a map that reads where tokens stand.
    """
    ends, begins = first.manifest.target, second.manifest.source
    if not ends.same_model(begins):
        raise NoWMatrix(
            "these W-Matrices do not follow each other",
            found=f"one leads to {ends.name} (weights {ends.weights[:12]}), "
            f"the next begins at {begins.name} (weights {begins.weights[:12]})",
            expected="the same model in between",
            remedy="give the maps in the order of the route",
        )
    if first.manifest.position_embeddings or second.manifest.position_embeddings:
        raise UnsupportedModel(
            "maps that read position embeddings are not folded",
            found="learned positions of one of the two",
            expected="models whose positions are not learned",
            remedy="fit a direct map",
        )


def composed(
    first: WMatrix, second: WMatrix, bridge: Bridge | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The composition over x, A's standardised states [S1] beside C's token features [E2].

    Returns:
        encode [S1 + E2, R], decode [R, O], bias [O], float32; R is the second's rank, and the
        first's more where the second is residual.
    """
    states, read = first.manifest.source_width, second.manifest.source_width
    between = bridge or algebra(first, second)
    latent, decode = first.encode[:states].float(), second.decode.float()
    encode = torch.cat((latent @ between.states, second.encode[read:].float() + between.tokens))
    if first.manifest.residual and bridge is None:
        # A's own states reach the second map beside the latent: the standardised ones, scaled back.
        columns = columns_of(second.manifest)
        encode[columns] += reading_of(second) / first.scale[columns, None]
    bias = second.bias + between.bias @ decode
    if not second.manifest.residual:
        return encode, decode, bias
    # What it adds to, B's states, goes through the first map's latent beside its own. A's own
    # states among them need no latent: the folded map is residual too.
    beside = torch.nn.functional.pad(latent, (0, 0, 0, len(encode) - states))
    decode = torch.cat((decode, first.decode.float()))
    return torch.cat((encode, beside), dim=1), decode, bias + first.bias


def algebra(first: WMatrix, second: WMatrix) -> Bridge:
    """What the second map makes of the first one's outputs, as a bridge; tokens say nothing."""
    columns, into = columns_of(second.manifest), reading_of(second)
    constant = first.bias[columns] - second.mean[: len(columns)]
    if first.manifest.residual:
        constant = constant + first.mean[columns]
    tokens = torch.zeros(second.manifest.embedding_width, second.manifest.rank)
    return Bridge(first.decode[:, columns].float() @ into, tokens, constant @ into)


def reading_of(wmatrix: WMatrix) -> Tensor:
    """From states as they are, less their mean, to their share of a map's latent, [S, R]."""
    read = wmatrix.manifest.source_width
    return wmatrix.scale[:read, None] * wmatrix.encode[:read].float()


def columns_of(manifest: WMatrixManifest) -> Tensor:
    """Where the states that a map reads stand among all states of its source model."""
    source = manifest.source
    parts = split_states(source, torch.arange(source.width)[None])
    return torch.cat([part[layer].flatten() for part in parts for layer in manifest.layers])


def cut(encode: Tensor, decode: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product of a lower rank: the best one for uncorrelated features of unit variance,
    every output measured in its own spread, as the fit measures them.

    Args:
        encode: [F, R]; decode: [R, O].
    """
    if rank >= len(decode):
        return encode, decode
    small = torch.linalg.qr(encode, mode="r").R @ decode
    spread = small.norm(dim=0).clamp_min(torch.finfo(small.dtype).tiny)
    basis = leading_right_vectors(small / spread, rank, seed=0)
    return encode @ (decode / spread) @ basis, basis.T * spread


def manifest_of(
    first: WMatrix, second: WMatrix, rank: int, bridge: Bridge | None
) -> WMatrixManifest:
    """What the folded map says of itself: nothing that was measured of either part."""
    one, two = first.manifest, second.manifest
    both = f"{one.anchors.digest} {two.anchors.digest}"
    return WMatrixManifest(
        source=one.source,
        target=two.target,
        layers=one.layers,
        rank=rank,
        predecessors=two.predecessors,
        residual=one.residual and two.residual,
        sink=two.sink,
        anchors=Anchors(
            digest=hashlib.sha256(both.encode()).hexdigest(),
            documents=one.anchors.documents + two.anchors.documents,
            tokens=one.anchors.tokens + two.anchors.tokens,
        ),
        fit={"bridge_rows": bridge.rows if bridge else 0},
        r2={},
        composed=(*(one.composed or (first.payload,)), *(two.composed or (second.payload,))),
        versions=versions(),
    )


@dataclass(frozen=True)
class Hop:
    """A map with its source model, at hand to read texts."""

    wmatrix: WMatrix
    folder: Path
    model: PreTrainedModel

    def share(self, text: str, target: Spans) -> tuple[Tensor, Tensor]:
        """The states' share of the latent [T, R] for tokens of these spans, and which of them [T]
        are aligned to the first position, which says nothing."""
        manifest = self.wmatrix.manifest
        tokens = read_tokens(self.folder, text)
        index = torch.from_numpy(align(tokens.spans, target))
        states_of = states(self.model, tokens.ids)
        flat = flat_states(manifest.source, *states_of, index, manifest.layers)
        read = manifest.source_width
        return (flat - self.wmatrix.mean[:read]) @ reading_of(self.wmatrix), masked_rows(index)


@torch.no_grad()
def learn_bridge(
    first: Hop,
    second: Hop,
    target: Path,
    embed: Embed,
    documents: Sequence[Document],
    *,
    rows: int = BRIDGE_TOKENS,
) -> Bridge:
    """The bridge between two maps, from texts that A and B read.

    Args:
        target, embed: C's folder, for its tokenizer, and its embedding.
        documents: texts of the kinds that memories are made of, none that anything is measured on.
        rows: C's tokens to learn from.

    Raises:
        BadInput: too few texts, or a first map that adds to A's states, which no bridge reads.
    """
    if first.wmatrix.manifest.residual:
        raise BadInput(
            "no bridge is learned after a map that adds to the source's own states",
            found=f"{first.wmatrix.manifest.source.name} and a variant of it",
            remedy="fold without a bridge: the algebra carries such states as they are",
        )
    statistics: Statistics | None = None
    for x, y in chunks(first, second, target, embed, documents, rows):
        statistics = statistics or Statistics.start(x, y)
        statistics.add(x, y)
    if statistics is None:
        raise BadInput("no texts to learn a bridge from", found="no usable tokens")
    count, x_mean, x_scale = statistics.rows, statistics.x_mean, statistics.x_scale
    rank = second.wmatrix.manifest.rank
    encode, decode, bias = reduced_rank_ridge(statistics, rank, BRIDGE_RIDGE, torch.ones(rank))
    weight = encode @ decode / x_scale[:, None]
    states_rows = first.wmatrix.manifest.rank
    return Bridge(weight[:states_rows], weight[states_rows:], bias - x_mean @ weight, count)


def chunks(
    first: Hop, second: Hop, target: Path, embed: Embed, documents: Sequence[Document], rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the regression: the first latent's share of A's states beside C's token features
    [N, R1 + E2], and the second latent's share of B's states [N, R2]."""
    pending: list[tuple[Tensor, Tensor]] = []
    total = 0
    with tqdm(total=rows, unit="tok", desc="bridge") as bar:
        for text in shuffled_windows(documents, seed=0):
            tokens, spans = token_features(second.wmatrix, target, embed, text)
            x, masked = first.share(text, spans)
            y, too = second.share(text, spans)
            usable = ~(masked | too)
            pending.append((torch.cat((x, tokens), dim=1)[usable], y[usable]))
            total += len(pending[-1][0])
            bar.update(len(pending[-1][0]))
            if sum(len(y) for _, y in pending) >= BRIDGE_CHUNK or total >= rows:
                yield stacked(pending)
                pending = []
            if total >= rows:
                return
    if pending:
        yield stacked(pending)


def stacked(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*rows, strict=True)
    return torch.cat(x), torch.cat(y)


def token_features(wmatrix: WMatrix, target: Path, embed: Embed, text: str) -> tuple[Tensor, Spans]:
    """What a map reads of its target's tokens of a text, standardised [T, E], and their spans."""
    manifest = wmatrix.manifest
    tokens = tokenize(load_tokenizer(str(target)), text)
    ids = [*manifest.sink, *tokens.ids]
    features = embedding_features(embed, ids, len(manifest.sink), manifest.predecessors)
    begin = manifest.source_width
    return (features - wmatrix.mean[begin:]) * wmatrix.scale[begin:], tokens.spans
