"""Published figures of models whose weights cannot be had: shown, and never enough to serve from.

Every figure here is a "prior". Its interval is a *published range*, from the lowest to the highest
figure in the tables that applies. It is no confidence interval: the documents do not say how many
transfers lie within it, or that any was measured.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable

import numpy as np

from awareness_vllm.compatibility.prior_tables import Architecture, Class, Range, tables
from awareness_vllm.compatibility.report import Basis, Cell
from awareness_vllm.errors import BadInput, similar_names
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.wmatrix.certificate import Interval

MATRIX_TOKENS = (10_000, 50_000)
"""The context lengths that the memory matrix was published for."""
COLUMN = 32_000
"""The one length of the context table among them."""
ROUNDING = 0.005
"""The tables are in whole percent."""
ROTARY = frozenset({"rope", "linear", "dynamic", "llama3", "yarn", "longrope"})
"""Schemes of geometries that the documents call RoPE."""


def known_name(name: str, others: Iterable[str] = ()) -> str:
    """The published name of a model, in any spelling; the error also suggests `others`.

    Raises:
        BadInput: nothing is published of such a model.
    """
    if (known := find_name(name)) is not None:
        return known
    raise unknown("model", name, {*tables().models, *tables().aliases.names, *others})


def find_name(name: str) -> str | None:
    """As `known_name`; None for an unknown model."""
    names = {spelling(n): n for n in tables().models}
    names |= {spelling(alias): n for alias, n in tables().aliases.names.items()}
    return names.get(spelling(name))


def spelling(name: str) -> str:
    """A name without case, spaces and punctuation but "+", in which spellings differ."""
    return "".join(c for c in name.casefold().replace("+", "plus") if c.isalnum())


def unknown(what: str, name: str, known: Iterable[str]) -> BadInput:
    """The error about an unknown name, with the known names that are similar to it."""
    known = sorted(known)
    return BadInput(
        f"unknown {what}",
        found=repr(name),
        expected=f"one of {', '.join(similar_names(name, known) or known)}",
        remedy=f"give a known name{', or the folder of the model' if what == 'model' else ''}",
    )


def published_cells() -> list[Cell]:
    """The published compatibility matrix: every pair with a published figure."""
    models = tables().models
    known = {(s, t): published_retention(s, t, COLUMN) for s in models for t in models}
    return [
        Cell(source=s, target=t, retention=k[0], basis=k[1]) for (s, t), k in known.items() if k
    ]


def published_retention(
    source: str, target: str, tokens: int, content: str | None = None
) -> tuple[Interval, Basis] | None:
    """The published retention of a memory of `tokens` tokens from one model on another.

    The mean is the memory matrix's figure, scaled by the context table as in `at_length`. With a
    kind of `content` it is the middle between this and the middle of that content's range: the
    documents do not say how the two combine. The interval goes from the lowest to the highest
    figure for the pair: the matrix's, the context table's, and the range of the content, or of all
    contents. Content does not apply to a model and itself (its figures are for cross-model
    transfers).

    A model with partial support has one range with all others, and of two the lower ends count; it
    is scaled like a different architecture's, and content does not apply (it is of another
    document).

    Returns:
        None for a pair without a published figure.

    Raises:
        BadInput: an unknown model or content.
    """
    pair = known_name(source), known_name(target)
    kind = None if content is None else content_range(content)
    where = [tables().context.source]
    if (figure := tables().memory.at(*pair)) is not None:
        interval = _of_figure(figure, tokens)
        where.insert(0, tables().memory.source)
        if pair[0] != pair[1]:
            interval = _with_content(interval, kind)
            where.append(tables().content.source)
    elif (span := _partial(*pair)) is not None:
        factor = at_length("different", tokens)
        interval = _interval(sum(span) / 2 * factor, [end * factor for end in span])
        where.insert(0, tables().partial.source)
    else:
        return None
    return _rounded(interval), Basis(kind="prior", source="; ".join(where))


def published_vectors(source: str, target: str) -> tuple[Interval, Basis] | None:
    """The published retention of a vector (weights, not a memory) from one model on another.

    The interval covers the ranges of all tiers that the figure lies in; for a partially supported
    model it is its range. None for a pair without a published figure.

    Raises:
        BadInput: an unknown model.
    """
    pair = known_name(source), known_name(target)
    if (figure := tables().vectors.at(*pair)) is not None:
        tiers = [r for r in tables().tiers.ranges if r[0] <= figure <= r[1]]
        interval = _interval(figure, [end for tier in tiers for end in tier])
        where = f"{tables().vectors.source}; {tables().tiers.source}"
    elif (span := _partial(*pair)) is not None:
        interval, where = _interval(sum(span) / 2, span), tables().partial.source
    else:
        return None
    return _rounded(interval), Basis(kind="prior", source=where)


def published_route(source: str, target: str, tokens: int) -> tuple[tuple[str, ...], float, float]:
    """The best route between two different models by published figures, direct or through one other
    model: its models, the product of its retentions, and the retention of the direct transfer.

    Raises:
        BadInput: an unknown model.
    """
    start, end = known_name(source), known_name(target)
    routes = [(start, end), *((start, m, end) for m in tables().models if m not in (start, end))]
    retentions = {}
    for route in routes:
        figures = [published_retention(*pair, tokens) for pair in itertools.pairwise(route)]
        retentions[route] = math.prod(figure[0].mean for figure in figures if figure)
    best = max(routes, key=retentions.__getitem__)
    return best, retentions[best], retentions[start, end]


def published_error(retention: float) -> float | None:
    """The middle of the published reconstruction errors of the tiers that a retention lies in, of
    the first tier where it is above all of them; None below all of them."""
    tiers = tables().tiers
    known = list(zip(tiers.ranges, tiers.errors, strict=True))
    errors = [error for (low, high), error in known if low <= retention <= high]
    if retention > known[0][0][1]:
        errors = [known[0][1]]
    if not errors:
        return None
    return (min(low for low, _ in errors) + max(high for _, high in errors)) / 2


def class_of(figure: float) -> Class:
    """The similarity of two architectures, by the matrix: the class whose retention at 32K tokens
    the pair's figure reaches, so that a doubtful pair loses more with length, not less."""
    column = tables().context.tokens.index(COLUMN)
    if figure >= tables().context.same[column]:
        return "same"
    return "similar" if figure >= tables().context.similar[column] else "different"


def by_length(architectures: Class, tokens: int) -> float:
    """The context table's retention, linear in the logarithm of tokens between its lengths, and
    that of its first and last length beyond them."""
    context = tables().context
    return float(
        np.interp(math.log(max(tokens, 1)), np.log(context.tokens), context.of(architectures))
    )


def at_length(architectures: Class, tokens: int) -> float:
    """The factor for a figure of the matrix: 1 within the lengths that it was published for,
    beyond them the context table's ratio to the nearer end."""
    low, high = MATRIX_TOKENS
    nearest = min(max(tokens, low), high)
    return by_length(architectures, tokens) / by_length(architectures, nearest)


def content_range(content: str) -> Range:
    """The published range of a kind of content. Raises BadInput."""
    ranges = {spelling(name): span for name, span in tables().content.ranges.items()}
    if (span := ranges.get(spelling(content))) is None:
        raise unknown("kind of content", content, tables().content.ranges)
    return span


def positional_impact(source_scheme: str, target_scheme: str, windowed: bool) -> Range | None:
    """The published share that the conversion of positions loses, lowest and highest; None for a
    conversion without a published figure.

    Args:
        source_scheme, target_scheme: as in `Positions.scheme`.
        windowed: whether the source has sliding windows.
    """
    schemes = ["rope" if s in ROTARY else s for s in (source_scheme, target_scheme)]
    for row in tables().positions.rows:
        if [row.source, row.target] == schemes and row.window == windowed:
            return row.loss
    return None


def published_shares() -> dict[str, float]:
    """Sources of degradation, each with its published share of the whole loss."""
    return dict(tables().shares.shares)


def without_loss_by(source: str, retention: float) -> float:
    """What one source of degradation leaves: 1 less its published share of the whole loss."""
    return 1 - published_shares()[source] * (1 - min(max(retention, 0.0), 1.0))


def published_architecture(name: str) -> Architecture | None:
    """The published architecture of a model; None where there is none. Raises BadInput."""
    return tables().architectures.models.get(known_name(name))


def published_geometry(name: str) -> Geometry | None:
    """The cache of a published architecture, to compute sizes from; None where there is none.

    No KV heads are published: each attention head counts as one, so sizes are upper bounds. It has
    no fingerprints, and no limit of positions.

    Raises:
        BadInput: an unknown model.
    """
    if (shape := published_architecture(name)) is None:
        return None
    layer = LayerGeometry(
        heads=shape.heads,
        head_dim=shape.hidden_size // shape.heads,
        positions=Positions(scheme=shape.positions),
    )
    return Geometry(
        name=known_name(name),
        model_type="published",
        dtype="bfloat16",
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocabulary,
        max_positions=sys.maxsize,
        layers=(layer,) * shape.layers,
        weights="",
        tokenizer="",
    )


def _of_figure(figure: float, tokens: int) -> Interval:
    """A figure of the matrix at a length, with the context table's for its class.

    Shorter contexts gain, but never beyond both published figures: a matrix that says 99 % of
    medium contexts does not promise 100 % of short ones.
    """
    architectures = class_of(figure)
    table = by_length(architectures, tokens)
    scaled = min(figure * at_length(architectures, tokens), max(figure, table))
    return _interval(scaled, [table])


def _with_content(interval: Interval, kind: Range | None) -> Interval:
    """A pair's figures with those of a kind of content, of all kinds where it is unknown."""
    ranges = tables().content.ranges.values() if kind is None else [kind]
    mean = interval.mean if kind is None else (interval.mean + sum(kind) / 2) / 2
    return _interval(mean, [interval.ci_low, interval.ci_high, *itertools.chain(*ranges)])


def _partial(source: str, target: str) -> Range | None:
    """The range of a partially supported model with any other, of two the lower ends."""
    ranges = [r for name in (source, target) if (r := tables().partial.ranges.get(name))]
    if not ranges or source == target:
        return None
    return min(low for low, _ in ranges), min(high for _, high in ranges)


def _interval(mean: float, figures: Iterable[float]) -> Interval:
    """The mean, and the lowest and highest of it and other figures."""
    figures = [mean, *figures]
    return Interval(mean=mean, ci_low=min(figures), ci_high=max(figures))


def _rounded(interval: Interval) -> Interval:
    """The interval, wider by the tables' rounding."""
    low, high = interval.ci_low - ROUNDING, interval.ci_high + ROUNDING
    return Interval(mean=interval.mean, ci_low=max(low, 0.0), ci_high=min(high, 1.0))
