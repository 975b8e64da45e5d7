"""HTML and SVG elements. Text is escaped unless it is `Html` already, so none is forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def el(name: str, *children: str, **attributes: str | float | None) -> Html:
    """An element; `class_` is the attribute `class`, `aria_label` is `aria-label`, and an attribute
    that is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Html:
    """Elements and texts one after the other."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children))


def attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def table(
    name: str,
    columns: Iterable[str],
    rows: Iterable[tuple[str, Iterable[str]]],
    class_: str | None = None,
) -> Html:
    """A table in a box of its own that scrolls sideways where it is too wide. Each row is its
    header and its cells; a cell that is no `<td>` yet becomes one. The name is for those who do
    not see the heading above."""
    head = el("tr", *(el("th", column, scope="col") for column in columns))
    body = (el("tr", el("th", row, scope="row"), *map(as_cell, cells)) for row, cells in rows)
    whole = el("table", el("thead", head), el("tbody", *body), class_=class_, aria_label=name)
    # Who has no mouse scrolls what has the focus.
    return el("div", whole, class_="scroll", role="region", aria_label=name, tabindex="0")


def as_cell(cell: str) -> Html:
    return cell if isinstance(cell, Html) and cell.startswith("<td") else el("td", cell)
