"""Figures and their names as text, in the terminal and on the page.

A prior never looks like a measured figure.
"""

from __future__ import annotations

from awareness_vllm.compatibility.report import LEVELS, Basis, Curve, Level, level_of
from awareness_vllm.wmatrix.certificate import Interval

LOOKS: dict[Level, str] = {level: f"l{i}" for i, (_, level, _) in enumerate(LEVELS)}
"""The page's class for each level's colour."""
CONDITIONS = {
    "native": "native: the target reads the text",
    "memory": "memory: the map alone",
    "tokens_only": "tokens only: the source's states blanked",
    "wrong_memory": "wrong memory: another document's",
    "none": "none",
}
METRICS = {"nll": "NLL", "kl": "KL", "top1": "top-1", "exact_match": "facts"}


def is_prior(basis: Basis | None) -> bool:
    """Whether a figure on this basis was published and not measured."""
    return basis is not None and basis.kind == "prior"


def percent(share: float, prior: bool = False) -> str:
    """A share in per cent; a prior's is rounded and begins with "~"."""
    return f"~{100 * share:.3g} %" if prior else f"{100 * share:.1f} %"


def spread(low: float | None, high: float | None) -> str:
    """The ends of an interval of shares; empty where there is none."""
    if low is None or high is None or low == high:
        return ""
    return f"{100 * low:.1f} … {100 * high:.1f}"


def figure(interval: Interval, basis: Basis | None = None) -> str:
    """A share and its interval in one line."""
    ends = spread(interval.ci_low, interval.ci_high)
    return percent(interval.mean, is_prior(basis)) + (f" ({ends})" if ends else "")


def look(retention: float) -> str:
    """The page's class for a retention's colour."""
    level, _ = level_of(retention)
    assert level is not None
    return LOOKS[level]


def seconds(value: float) -> str:
    """A time in milliseconds or seconds."""
    return f"{1000 * value:,.0f} ms" if value < 1 else f"{value:,.1f} s"


def size(gigabytes: float) -> str:
    """An amount of memory in MB or GB."""
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.1f} MB"


def plan(curve: Curve) -> str:
    """The name of a curve's way to load a memory."""
    return native(curve.tail, curve.reread)


def native(tail: int | str, reread: int | str = 0) -> str:
    """What of a memory is read natively: how many last tokens, and how many in place."""
    parts = [f"last {tail} tokens read natively"] if tail else []
    parts += [f"up to {reread} re-read in place"] if reread else []
    return ", ".join(parts) or "the map alone"


def metric(name: str) -> str:
    """The short name of what was measured in an arm."""
    return METRICS.get(name, name)


def condition(name: str) -> str:
    """The name of one of the five arms; `memory_tail_48_reread_24` reads its last 48 tokens
    natively, and up to 24 more in place."""
    name, _, reread = name.partition("_reread_")
    kind, _, tail = name.partition("_tail_")
    words = CONDITIONS.get(kind, kind)
    natively = tail or reread
    return f"{words.partition(':')[0]}, {native(tail, reread)}" if natively else words
