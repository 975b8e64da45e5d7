"""What was published of models whose weights nobody can get: shown, and never enough to serve from.

Every figure here carries a `Basis` of kind "prior". Its interval is a *published range*: what the
tables give, from the lowest to the highest figure that speaks of the case. It is no confidence
interval; nobody says how many transfers lie within it, or that any was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from awareness_vllm.compatibility.prior_tables import Architecture, Class, Range, tables
from awareness_vllm.compatibility.report import Basis, Cell
from awareness_vllm.errors import BadInput, similar_names
from awareness_vllm.wmatrix.certificate import Interval

MATRIX_TOKENS = (10_000, 50_000)
"""The context lengths that the memory matrix is said to hold for."""
COLUMN = 32_000
"""The one length of the context table that lies among them."""
ROUNDING = 0.005
"""The tables are in whole percent."""
ROTARY = frozenset({"rope", "linear", "dynamic", "llama3", "yarn", "longrope"})
"""Schemes of geometries that the documents call RoPE."""


def known_name(name: str, others: Iterable[str] = ()) -> str:
    """The published name of a model, however it is spelled; `others` may be meant as well.

    Raises:
        BadInput: nothing is published of such a model; the nearest known names are given.
    """
    if (found := find_name(name)) is not None:
        return found
    raise unknown("model", name, {*tables().models, *tables().aliases.names, *others})


def find_name(name: str) -> str | None:
    """As `known_name`, None where nobody published anything."""
    names = {spelling(n): n for n in tables().models}
    names |= {spelling(alias): n for alias, n in tables().aliases.names.items()}
    return names.get(spelling(name))


def spelling(name: str) -> str:
    """A name without what spellings differ in: case, spaces and punctuation but "+"."""
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
    """The published compatibility matrix: every pair that a figure was published for."""
    models = tables().models
    found = {(s, t): published_retention(s, t, COLUMN) for s in models for t in models}
    return [
        Cell(source=s, target=t, retention=f[0], basis=f[1]) for (s, t), f in found.items() if f
    ]


def published_retention(
    source: str, target: str, tokens: int, content: str | None = None
) -> tuple[Interval, Basis] | None:
    """What a memory of so many tokens is said to keep from one model to another.

    The mean is the memory matrix's figure, moved by the context table as `at_length` says. Where
    the kind of `content` is given, it lies half way to the middle of that content's range: the
    documents do not say how the two combine. The interval goes from the lowest to the highest of
    the figures that speak of the pair: the matrix's, the context table's, and the range of the
    content, of all contents where none is given. Content says nothing of a model and itself (its
    figures are for cross-model transfers).

    A model with partial support has a range, with any other, and of two the lower ends count; it is
    moved like a different architecture's, and content says nothing of it (it stands in another
    document).

    Returns:
        None where nothing was published of the pair.

    Raises:
        BadInput: a model or content that nobody published anything of.
    """
    ends = known_name(source), known_name(target)
    kind = None if content is None else content_range(content)
    where = [tables().context.source]
    if (figure := tables().memory.at(*ends)) is not None:
        interval = _of_figure(figure, tokens)
        where.insert(0, tables().memory.source)
        if ends[0] != ends[1]:
            interval = _with_content(interval, kind)
            where.append(tables().content.source)
    elif (span := _partial(*ends)) is not None:
        factor = at_length("different", tokens)
        interval = _interval(sum(span) / 2 * factor, [end * factor for end in span])
        where.insert(0, tables().partial.source)
    else:
        return None
    return _rounded(interval), Basis(kind="prior", source="; ".join(where))


def published_vectors(source: str, target: str) -> tuple[Interval, Basis] | None:
    """What a vector (weights, not a memory) is said to keep from one model to another.

    The interval covers the ranges of all tiers that the figure lies in; for a partially supported
    model it is its range. None where nothing was published of the pair.

    Raises:
        BadInput: a model that nobody published anything of.
    """
    ends = known_name(source), known_name(target)
    if (figure := tables().vectors.at(*ends)) is not None:
        tiers = [r for r in tables().tiers.ranges if r[0] <= figure <= r[1]]
        interval = _interval(figure, [end for tier in tiers for end in tier])
        where = f"{tables().vectors.source}; {tables().tiers.source}"
    elif (span := _partial(*ends)) is not None:
        interval, where = _interval(sum(span) / 2, span), tables().partial.source
    else:
        return None
    return _rounded(interval), Basis(kind="prior", source=where)


def class_of(figure: float) -> Class:
    """How alike two architectures are, read off the matrix: the class whose retention at 32K tokens
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
    """What a figure of the matrix is to be multiplied by: 1 within the lengths that it holds for,
    beyond them what the context table gains or loses from the nearer end."""
    low, high = MATRIX_TOKENS
    nearest = min(max(tokens, low), high)
    return by_length(architectures, tokens) / by_length(architectures, nearest)


def content_range(content: str) -> Range:
    """The published range of a kind of content. Raises BadInput."""
    ranges = {spelling(name): found for name, found in tables().content.ranges.items()}
    if (found := ranges.get(spelling(content))) is None:
        raise unknown("kind of content", content, tables().content.ranges)
    return found


def positional_impact(
    source_scheme: str, target_scheme: str, window: int | None
) -> tuple[float, float] | None:
    """The share that converting positions is said to lose, lowest and highest.

    Args:
        source_scheme, target_scheme: as in `Positions.scheme`.
        window: the source's sliding window in tokens.

    Returns:
        None for a conversion that nobody published a figure for.
    """
    ends = ["rope" if s in ROTARY else s for s in (source_scheme, target_scheme)]
    for row in tables().positions.rows:
        if [row.source, row.target] == ends and row.window == (window is not None):
            return row.loss
    return None


def published_shares() -> dict[str, float]:
    """Sources of degradation, each with its published share of the whole loss."""
    return dict(tables().shares.shares)


def published_architecture(name: str) -> Architecture | None:
    """The published shape of a model that is known by name; None where there is none.

    Raises:
        BadInput: nothing is published of such a model.
    """
    return tables().architectures.models.get(known_name(name))


def _of_figure(figure: float, tokens: int) -> Interval:
    """A figure of the matrix at a length, beside the context table's for its class.

    Shorter contexts gain, but never beyond both published figures: a matrix that says 99 % of
    medium contexts does not promise 100 % of short ones.
    """
    architectures = class_of(figure)
    table = by_length(architectures, tokens)
    moved = min(figure * at_length(architectures, tokens), max(figure, table))
    return _interval(moved, [table])


def _with_content(interval: Interval, kind: Range | None) -> Interval:
    """A pair's figures beside those of a kind of content, of all kinds where it is not known."""
    ranges = tables().content.ranges.values() if kind is None else [kind]
    mean = interval.mean if kind is None else (interval.mean + sum(kind) / 2) / 2
    ends = (end for found in ranges for end in found)
    return _interval(mean, [interval.ci_low, interval.ci_high, *ends])


def _partial(source: str, target: str) -> Range | None:
    """The range of a partially supported model with any other, of two the lower ends."""
    ranges = [r for end in (source, target) if (r := tables().partial.ranges.get(end))]
    if not ranges or source == target:
        return None
    return min(low for low, _ in ranges), min(high for _, high in ranges)


def _interval(mean: float, figures: Iterable[float]) -> Interval:
    """The mean, and the lowest and highest of it and other figures."""
    ends = [mean, *figures]
    return Interval(mean=mean, ci_low=min(ends), ci_high=max(ends))


def _rounded(interval: Interval) -> Interval:
    """The interval with what rounding may have hidden at either end."""
    low, high = interval.ci_low - ROUNDING, interval.ci_high + ROUNDING
    return Interval(mean=interval.mean, ci_low=max(low, 0.0), ci_high=min(high, 1.0))
