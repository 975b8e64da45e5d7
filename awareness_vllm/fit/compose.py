"""The composition of two W-Matrices, A → B and B → C: one map A → C at the cost of a direct one.

Both maps are linear in standardised features, so their composition is one matrix product, and the
second map's latent is its bottleneck: the composition has the second's rank. Between the first
latent and the second one is either

- *the algebra*: decode of the first, standardise and encode of the second, multiplied out. It
  equals the chain of both maps, to float32 rounding, where the second map reads no tokens and B
  and C split texts alike. Elsewhere it leaves B's embeddings at their mean (features are
  standardised, so leaving them out is that), and reads A at the last byte of C's token instead of
  at that of the B-token around it, which may end later. B's rounding in between is left out.
- *or a bridge*, learned over texts that A and B read: a regression of the second latent's share of
  B's true states on the first latent's share of A's and on C's embeddings. The chain is no better
  than the first map's worst outputs: a dim of B's keys with hardly any variance is left to chance
  by the first map, and blown up by the second, which standardises it. Between two calibrated maps
  that ruined everything (docs/design.md); the regression trusts each direction of the first latent
  as far as the texts confirm it, and makes up for B's tokens by C's.
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
    state_columns,
)
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BRIDGE_TOKENS = 20_000
BRIDGE_CHUNK = 4096
"""Rows that a bridge is learned from, and rows summed at once."""
BRIDGE_RIDGE = 0.02
"""A share of the features' unit variance, as in the fit (docs/fidelity-log.md)."""


@dataclass(frozen=True)
class Bridge:
    """The linear map to the second latent's share of B's states: `states` [R1, R2] from the first
    latent's share of A's, `tokens` [E2, R2] from C's standardised token features, and `bias` [R2];
    learned on `rows` tokens, none for the algebra."""

    states: Tensor
    tokens: Tensor
    bias: Tensor
    rows: int = 0


def compose(
    first: WMatrix, second: WMatrix, *, bridge: Bridge | None = None, rank: int | None = None
) -> WMatrix:
    """The map that applies `second` to the outputs of `first`; it is not certified.

    Args:
        bridge: from `learn_bridge`; the algebra by default.
        rank: of the result, by default the second's; the composition with a residual `second` has
            the sum of both ranks before it is reduced.

    Raises:
        NoWMatrix, UnsupportedModel: as `check_consecutive` says.
    """
    check_consecutive(first, second)
    encode, decode, bias = compose_tensors(first, second, bridge)
    encode, decode = reduce_rank(encode, decode, rank or second.manifest.rank)
    mean, scale = (
        torch.cat((a[: first.manifest.source_width], b[second.manifest.source_width :]))
        for a, b in ((first.mean, second.mean), (first.scale, second.scale))
    )
    return WMatrix(
        composed_manifest(first, second, len(decode), bridge),
        mean=mean,
        scale=scale,
        encode=encode.to(second.encode.dtype),
        decode=decode.to(second.decode.dtype),
        bias=bias,
        sink_keys=second.sink_keys,
        sink_values=second.sink_values,
    )


def check_consecutive(first: WMatrix, second: WMatrix) -> None:
    """Check that two maps can be composed.

    Raises:
        NoWMatrix: the second does not begin at the first one's target.
        UnsupportedModel: a map that reads position embeddings.
    """
    end, begin = first.manifest.target, second.manifest.source
    if not end.same_model(begin):
        raise NoWMatrix(
            "these W-Matrices do not follow each other",
            found=f"one leads to {end.identity}, the next begins at {begin.identity}",
            expected="the same model in between",
            remedy="give the maps in the order of the route",
        )
    if first.manifest.position_embeddings or second.manifest.position_embeddings:
        raise UnsupportedModel(
            "maps that read position embeddings cannot be composed",
            found="learned positions in one of the two",
            expected="models whose positions are not learned",
            remedy="fit a direct map",
        )


def compose_tensors(
    first: WMatrix, second: WMatrix, bridge: Bridge | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The composition over A's standardised states [S1] and C's token features [E2].

    Returns:
        encode [S1 + E2, R], decode [R, O], bias [O], float32; R is the second's rank, plus the
        first's where the second is residual.
    """
    states, read = first.manifest.source_width, second.manifest.source_width
    between = bridge or algebraic_bridge(first, second)
    latent, decode = first.encode[:states].float(), second.decode.float()
    encode = torch.cat((latent @ between.states, second.encode[read:].float() + between.tokens))
    if first.manifest.residual and bridge is None:
        # A's states reach the second map past the latent too, in their own units.
        columns = state_columns(second.manifest.source, second.manifest.layers)
        encode[columns] += latent_weights(second) / first.scale[columns, None]
    bias = second.bias + between.bias @ decode
    if not second.manifest.residual:
        return encode, decode, bias
    # The second map adds to B's states, which need the first map's latent beside its own. Where
    # they add to A's states in turn, the composition is residual too and adds to them itself.
    padded = torch.nn.functional.pad(latent, (0, 0, 0, len(encode) - states))
    decode = torch.cat((decode, first.decode.float()))
    return torch.cat((encode, padded), dim=1), decode, bias + first.bias


def algebraic_bridge(first: WMatrix, second: WMatrix) -> Bridge:
    """The exact bridge from the first map's outputs to the second one's latent, without tokens."""
    columns = state_columns(second.manifest.source, second.manifest.layers)
    weights = latent_weights(second)
    constant = first.bias[columns] - second.mean[: len(columns)]
    if first.manifest.residual:
        constant = constant + first.mean[columns]
    tokens = torch.zeros(second.manifest.embedding_width, second.manifest.rank)
    return Bridge(first.decode[:, columns].float() @ weights, tokens, constant @ weights)


def latent_weights(wmatrix: WMatrix) -> Tensor:
    """The weights [S, R] from centred source states, in their own units, to a map's latent."""
    read = wmatrix.manifest.source_width
    return wmatrix.scale[:read, None] * wmatrix.encode[:read].float()


def reduce_rank(encode: Tensor, decode: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `encode` [F, R] times `decode` [R, O] of a lower rank, for
    uncorrelated features of unit variance and outputs in units of their standard deviation."""
    if rank >= len(decode):
        return encode, decode
    small = torch.linalg.qr(encode, mode="r").R @ decode
    std = small.norm(dim=0).clamp_min(torch.finfo(small.dtype).tiny)
    basis = leading_right_vectors(small / std, rank, seed=0)
    return encode @ (decode / std) @ basis, basis.T * std


def composed_manifest(
    first: WMatrix, second: WMatrix, rank: int, bridge: Bridge | None
) -> WMatrixManifest:
    """The manifest of a composition, without the measured figures of its parts."""
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
    """A map with its source model."""

    wmatrix: WMatrix
    folder: Path
    model: PreTrainedModel

    def state_latents(self, text: str, target: Spans) -> tuple[Tensor, Tensor]:
        """The states' share of the latent [T, R] for tokens of these spans [T, 2], and whether each
        is aligned to the source's first position [T]."""
        manifest = self.wmatrix.manifest
        tokens = read_tokens(self.folder, text)
        index = torch.from_numpy(align(tokens.spans, target))
        states_of = states(self.model, tokens.ids)
        flat = flat_states(manifest.source, *states_of, index, manifest.layers)
        read = manifest.source_width
        return (flat - self.wmatrix.mean[:read]) @ latent_weights(self.wmatrix), masked_rows(index)


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
    """The bridge between two maps, learned from texts that A and B read.

    Args:
        target, embed: C's folder, for its tokenizer, and its embedding.
        documents: texts of the kinds that memories are made of, disjoint from those for evaluation.
        rows: C's tokens to learn from.

    Raises:
        BadInput: too few texts, or a residual first map.
    """
    if first.wmatrix.manifest.residual:
        raise BadInput(
            "no bridge can be learned after a residual map",
            found=f"{first.wmatrix.manifest.source.name} and a variant of it",
            expected="a first map that does not add to the source's own states",
            remedy="compose without a bridge: the algebra carries such states exactly",
        )
    statistics: Statistics | None = None
    for x, y in bridge_rows(first, second, target, embed, documents, rows):
        statistics = statistics or Statistics.start(x, y)
        statistics.add(x, y)
    if statistics is None:
        raise BadInput(
            "no texts to learn a bridge from", found="no usable tokens", expected="texts"
        )
    count, x_mean, x_std = statistics.rows, statistics.x_mean, statistics.x_std
    rank = second.wmatrix.manifest.rank
    encode, decode, bias = reduced_rank_ridge(statistics, rank, BRIDGE_RIDGE, torch.ones(rank))
    weight = encode @ decode / x_std[:, None]
    states_rows = first.wmatrix.manifest.rank
    return Bridge(weight[:states_rows], weight[states_rows:], bias - x_mean @ weight, count)


def bridge_rows(
    first: Hop, second: Hop, target: Path, embed: Embed, documents: Sequence[Document], rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of the regression's rows: the first latent's share of A's states with C's token
    features [N, R1 + E2], and the second latent's share of B's states [N, R2]."""
    pending: list[tuple[Tensor, Tensor]] = []
    total = 0
    with tqdm(total=rows, unit="tok", desc="bridge") as bar:
        for text in shuffled_windows(documents, seed=0):
            tokens, spans = token_features(second.wmatrix, target, embed, text)
            x, masked = first.state_latents(text, spans)
            y, also_masked = second.state_latents(text, spans)
            usable = ~(masked | also_masked)
            pending.append((torch.cat((x, tokens), dim=1)[usable], y[usable]))
            total += len(pending[-1][0])
            bar.update(len(pending[-1][0]))
            if sum(len(y) for _, y in pending) >= BRIDGE_CHUNK or total >= rows:
                yield concatenate_rows(pending)
                pending = []
            if total >= rows:
                return
    if pending:
        yield concatenate_rows(pending)


def concatenate_rows(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair [N, X], [N, Y] of several."""
    x, y = zip(*rows, strict=True)
    return torch.cat(x), torch.cat(y)


def token_features(wmatrix: WMatrix, target: Path, embed: Embed, text: str) -> tuple[Tensor, Spans]:
    """A map's standardised token features [T, E] of a text, and its target tokens' spans."""
    manifest = wmatrix.manifest
    tokens = tokenize(load_tokenizer(str(target)), text)
    ids = [*manifest.sink, *tokens.ids]
    features = embedding_features(embed, ids, len(manifest.sink), manifest.predecessors)
    begin = manifest.source_width
    return (features - wmatrix.mean[begin:]) * wmatrix.scale[begin:], tokens.spans
