"""`priors.json`: the published tables, each with the document and heading that it was copied from.

Nothing in them was measured by this project. A unit test checks that rows, columns and names agree.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from awareness_vllm.schema import FrozenModel

FILE = Path(__file__).with_name("priors.json")


Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Fraction, Fraction]
"""A published range, lowest and highest: not a confidence interval."""
Class = Literal["same", "similar", "different"]
Scheme = Literal["rope", "learned", "alibi"]


class Pairs(FrozenModel):
    """Retention by source (rows) and target (columns, in the order of `models`)."""

    source: str
    models: tuple[str, ...]
    rows: dict[str, tuple[Fraction | None, ...]]

    def at(self, source: str, target: str) -> float | None:
        """The pair's figure; None where none was published."""
        if source not in self.models or target not in self.models:
            return None
        return self.rows[source][self.models.index(target)]


class Ranges(FrozenModel):
    """Published ranges by name."""

    source: str
    ranges: dict[str, Range]


class Tiers(FrozenModel):
    """Expected retention, and reconstruction error, of maps of tiers 1 to 4."""

    source: str
    ranges: tuple[Range, ...]
    errors: tuple[Range, ...]


class Lengths(FrozenModel):
    """Retention by tokens of context, for architectures of each class."""

    source: str
    tokens: tuple[int, ...]
    same: tuple[Fraction, ...]
    similar: tuple[Fraction, ...]
    different: tuple[Fraction, ...]

    def of(self, architectures: Class) -> tuple[float, ...]:
        """The figures of a class, one for each of `tokens`."""
        return getattr(self, architectures)


class Conversion(FrozenModel):
    """The loss of a conversion of positions; `window` is the source's."""

    source: Scheme
    window: bool
    target: Scheme
    loss: Range
    method: str


class Conversions(FrozenModel):
    """The conversions with a published figure."""

    source: str
    rows: tuple[Conversion, ...]


class Shares(FrozenModel):
    """Sources of degradation and their shares of the whole loss."""

    source: str
    shares: dict[str, Fraction]


class Architecture(FrozenModel):
    """A model's published shape; `estimated` names the fields that are a guess."""

    hidden_size: int
    heads: int
    layers: int
    vocabulary: int
    activation: str
    positions: Scheme
    window: bool
    estimated: tuple[Literal["hidden_size", "heads", "layers", "vocabulary"], ...]


class Architectures(FrozenModel):
    """Shapes of models that are known by name."""

    source: str
    models: dict[str, Architecture]


class Aliases(FrozenModel):
    """Other names of published models, to the names that the tables have."""

    source: str
    names: dict[str, str]


class Tables(FrozenModel):
    """The whole file."""

    memory: Pairs
    vectors: Pairs
    tiers: Tiers
    partial: Ranges
    context: Lengths
    content: Ranges
    positions: Conversions
    shares: Shares
    architectures: Architectures
    aliases: Aliases

    @property
    def models(self) -> tuple[str, ...]:
        """Every model with a published figure."""
        return (*self.memory.models, *self.partial.ranges)


@functools.cache
def tables() -> Tables:
    """The published tables."""
    return Tables.model_validate_json(FILE.read_text(encoding="utf-8"))
