"""Two W-Matrices, A → B and B → C, folded into one A → C that costs what a direct one does.

Both maps are linear in standardised features, so their composition is one matrix product, and the
second map's latent is its bottleneck: the folded map has the second's rank. Three things of the
chain are not linear in what the folded map reads, and are approximated:

- *B's tokens.* The first map also reads B's embeddings of B's tokens. The folded map reads C's: its
  share of the first latent is regressed on C's embeddings over texts (`token_bridge`: tokenizers
  and embeddings alone, no model runs), or replaced by its mean. The features are standardised, so
  leaving it out *is* replacing it by its mean.
- *Which token of A.* The chain reads A at the last byte of the B-token that holds the last byte of
  C's token; the folded map reads A at the last byte of C's token itself, which is never later.
- *Rounding of B's states* to B's dtype in between, which the folded map does not do.

Without the first (the first map reads no tokens) and the second (B and C cut texts in the same
places) the folded map is the chain, to float32 rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awareness_vllm.align.features import Embed, embedding_features, split_states
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.anchors.spans import Spans, align, load_tokenizer, tokenize
from awareness_vllm.errors import BadInput, NoWMatrix
from awareness_vllm.provenance import versions
from awareness_vllm.wmatrix.file import Anchors, WMatrix, WMatrixManifest
from awareness_vllm.wmatrix.solve import leading_right_vectors, reduced_rank_ridge
from awareness_vllm.wmatrix.statistics import Statistics
from awareness_vllm.wmatrix.texts import shuffled_windows

BRIDGE_TOKENS = 40_000
BRIDGE_CHUNK = 4096
"""Rows that the regression of B's tokens on C's reads, and of how many its scales are taken."""
BRIDGE_RIDGE = 0.02
"""As in the fit: a share of the features' unit variance (docs/fidelity-log.md)."""


@dataclass(frozen=True)
class Reading:
    """A model as the token bridge sees it: its folder (for the tokenizer) and its embedding."""

    folder: Path
    embed: Embed


@dataclass(frozen=True)
class Bridge:
    """What C's embeddings tell of the first map's latent: `weight` [E2, R1] from the second map's
    standardised token features, `bias` [R1]; learned on `tokens` rows (0: the mean)."""

    weight: Tensor
    bias: Tensor
    tokens: int = 0


def fold(
    first: WMatrix, second: WMatrix, *, bridge: Bridge | None = None, rank: int | None = None
) -> WMatrix:
    """One map that gives what `second` makes of what `first` gives; nobody has measured it yet.

    Args:
        bridge: from `token_bridge`; without, B's embeddings are replaced by their mean.
        rank: of the result, by default the second's. Only where the second adds to the states that
            it is given (`residual`) does the composition have more: the sum of both.

    Raises:
        NoWMatrix: the second does not begin where the first ends.
    """
    check_consecutive(first, second)
    bridge = bridge or mean_bridge(first, second)
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
    """Raises NoWMatrix where the second map does not begin where the first ends."""
    ends, begins = first.manifest.target, second.manifest.source
    if not ends.same_model(begins):
        raise NoWMatrix(
            "these W-Matrices do not follow each other",
            found=f"one leads to {ends.name} (weights {ends.weights[:12]}), "
            f"the next begins at {begins.name} (weights {begins.weights[:12]})",
            expected="the same model in between",
            remedy="give the maps in the order of the route",
        )


def composed(first: WMatrix, second: WMatrix, bridge: Bridge) -> tuple[Tensor, Tensor, Tensor]:
    """The composition over x, A's standardised states [S1] beside C's token features [E2].

    Returns:
        encode [S1 + E2, R], decode [R, O], bias [O], float32; R is the second's rank, and the
        first's more where the second is residual.
    """
    states, read = first.manifest.source_width, second.manifest.source_width
    first_decode, second_decode = first.decode.float(), second.decode.float()
    # The first map over x: B's states are x @ latent @ first_decode + middle (+ A's own states).
    latent = torch.cat((first.encode[:states].float(), bridge.weight))
    middle = first.bias + bridge.bias @ first_decode
    # The second map reads some of them, standardises and encodes.
    columns = columns_of(second.manifest)
    into = second.scale[:read, None] * second.encode[:read].float()
    encode = latent @ (first_decode[:, columns] @ into)
    encode[states:] += second.encode[read:].float()
    constant = middle[columns] - second.mean[:read]
    if first.manifest.residual:  # A's own states are the standardised ones, scaled back and moved
        encode[columns] += into / first.scale[columns, None]
        constant += first.mean[columns]
    bias = second.bias + constant @ into @ second_decode
    if not second.manifest.residual:
        return encode, second_decode, bias
    # What it adds to, B's states, goes through the first map's latent beside its own. A's own
    # states among them need no latent: the folded map is residual too.
    encode = torch.cat((encode, latent), dim=1)
    return encode, torch.cat((second_decode, first_decode)), bias + middle


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


def manifest_of(first: WMatrix, second: WMatrix, rank: int, bridge: Bridge) -> WMatrixManifest:
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
        fit={"bridge_tokens": bridge.tokens},
        r2={},
        composed=(*(one.composed or (first.payload,)), *(two.composed or (second.payload,))),
        versions=versions(),
    )


def mean_bridge(first: WMatrix, second: WMatrix) -> Bridge:
    """B's tokens replaced by their mean: C's tokens say nothing of the first latent."""
    rank = first.manifest.rank
    return Bridge(torch.zeros(second.manifest.embedding_width, rank), torch.zeros(rank))


@torch.no_grad()
def token_bridge(
    first: WMatrix,
    second: WMatrix,
    middle: Reading,
    target: Reading,
    documents: Sequence[Document],
    *,
    tokens: int = BRIDGE_TOKENS,
) -> Bridge:
    """What the first map reads of B's tokens, regressed on what the second reads of C's.

    Args:
        middle, target: B and C.
        documents: any texts of the kinds that memories are made of.
        tokens: rows to learn from, C's tokens.

    Raises:
        BadInput: the texts have too few tokens.
    """
    check_consecutive(first, second)
    if not (first.manifest.reads_tokens and second.manifest.reads_tokens):
        return mean_bridge(first, second)
    statistics: Statistics | None = None
    for x, y in chunks(first, second, middle, target, documents, tokens):
        statistics = statistics or Statistics.start(x, y)
        statistics.add(x, y)
    if statistics is None:
        raise BadInput("no texts to learn the tokens' bridge from", found="no tokens at all")
    rows, x_mean, x_scale = statistics.rows, statistics.x_mean, statistics.x_scale
    rank = first.manifest.rank
    encode, decode, bias = reduced_rank_ridge(statistics, rank, BRIDGE_RIDGE, torch.ones(rank))
    weight = encode @ decode / x_scale[:, None]
    return Bridge(weight, bias - x_mean @ weight, rows)


def chunks(
    first: WMatrix,
    second: WMatrix,
    middle: Reading,
    target: Reading,
    documents: Sequence[Document],
    tokens: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the bridge: C's standardised token features [N, E2], the first latent's share of B's
    tokens [N, R1] at the B-token that holds the last byte of C's."""
    rows: list[tuple[Tensor, Tensor]] = []
    pending = total = 0
    for text in shuffled_windows(documents, seed=0):
        x, target_spans = token_features(second, target, text)
        b, middle_spans = token_features(first, middle, text)
        share = b @ first.encode[first.manifest.source_width :].float()
        rows.append((x, share[torch.from_numpy(align(middle_spans, target_spans))]))
        pending, total = pending + len(x), total + len(x)
        if pending >= BRIDGE_CHUNK:
            yield stacked(rows)
            rows, pending = [], 0
        if total >= tokens:
            break
    if rows:
        yield stacked(rows)


def stacked(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*rows, strict=True)
    return torch.cat(x), torch.cat(y)


def token_features(wmatrix: WMatrix, reading: Reading, text: str) -> tuple[Tensor, Spans]:
    """What a map reads of its target's tokens of a text, standardised [T, E], and their spans."""
    manifest = wmatrix.manifest
    tokens = tokenize(load_tokenizer(str(reading.folder)), text)
    ids = [*manifest.sink, *tokens.ids]
    features = embedding_features(reading.embed, ids, len(manifest.sink), manifest.predecessors)
    begin = manifest.source_width
    return (features - wmatrix.mean[begin:]) * wmatrix.scale[begin:], tokens.spans
