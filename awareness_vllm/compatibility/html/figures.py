"""How figures read, in the terminal and on the page: a prior never looks like a measured one."""

from __future__ import annotations

from awareness_vllm.compatibility.report import Basis, Level, level_of
from awareness_vllm.wmatrix.certificate import Interval

LOOKS: dict[Level, str] = {
    "Excellent": "l0",
    "Good": "l1",
    "Acceptable": "l2",
    "Marginal": "l3",
    "Poor": "l4",
}
"""The page's class for each level's colour."""


def is_prior(basis: Basis | None) -> bool:
    """Whether a figure on this basis is only somebody else's."""
    return basis is not None and basis.kind == "prior"


def percent(value: float, basis: Basis | None = None) -> str:
    """A share; a prior's is about."""
    return f"~{100 * value:.3g} %" if is_prior(basis) else f"{100 * value:.1f} %"


def spread(low: float | None, high: float | None) -> str:
    """An interval's ends; nothing where it has none."""
    if low is None or high is None or low == high:
        return ""
    return f"{100 * low:.1f} … {100 * high:.1f}"


def figure(interval: Interval, basis: Basis | None = None) -> str:
    """A share and its interval in one line."""
    ends = spread(interval.ci_low, interval.ci_high)
    return percent(interval.mean, basis) + (f" ({ends})" if ends else "")


def look(retention: float) -> str:
    """The class for a retention's colour."""
    level, _ = level_of(retention)
    assert level is not None
    return LOOKS[level]


def seconds(value: float) -> str:
    """A time as people read it."""
    return f"{1000 * value:,.0f} ms" if value < 1 else f"{value:,.1f} s"
