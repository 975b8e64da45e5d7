"""A report and a matrix as one page to look at: no script, nothing loaded, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from awareness_vllm.compatibility.html import charts
from awareness_vllm.compatibility.html.figures import is_prior, look, percent, seconds, spread
from awareness_vllm.compatibility.html.markup import Html, el, joined, table
from awareness_vllm.compatibility.report import (
    LEVELS,
    REMAINDER,
    Action,
    Basis,
    Cell,
    CompatibilityReport,
    Curve,
    Matrix,
    Share,
)
from awareness_vllm.wmatrix.certificate import Interval

if TYPE_CHECKING:
    from awareness_vllm.wmatrix.heat_map import HeadShares

UNKNOWN = el("span", "nobody knows", class_="unknown")
PUBLISHED = Basis(kind="prior", source="")
UNKNOWN_SHARE = el("span", "none", class_="unknown")
WITHOUT = "left with all of them lifted"
CONDITIONS = {
    "native": "native: the target reads the text",
    "memory": "memory: the map alone",
    "tokens_only": "tokens only: the source's states blanked",
    "wrong_memory": "wrong memory: another document's",
    "none": "none",
}
METRICS = {"nll": "NLL", "kl": "KL", "top1": "top-1", "exact_match": "facts"}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
{title}
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(
    *,
    report: CompatibilityReport | None = None,
    matrix: Matrix | None = None,
    heads: HeadShares | None = None,
) -> str:
    """One self-contained HTML document with a section for whatever is known.

    Args:
        report: what a memory would be on a target.
        matrix: all pairs; measured cells and priors are told apart at a glance.
        heads: which source heads the W-Matrix listens to.
    """
    sections: list[Html] = []
    title = "Compatibility of models"
    if report:
        title = f"{report.memory} on {report.target}"
        sections += of_report(report)
    if heads:
        sections.append(of_heads(heads))
    if matrix:
        sections.append(of_matrix(matrix))
    body = joined([el("h1", title), el("div", *sections, class_="cards"), footer()])
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return PAGE.format(title=el("title", title), style=style, body=body)


def card(heading: str, *children: str, wide: bool = False, basis: Basis | None = None) -> Html:
    """A section; one whose figures are priors says so beside its heading."""
    marked = [" ", el("span", "prior", class_="badge prior")] if is_prior(basis) else []
    class_ = prior("card wide" if wide else "card", basis)
    return el("section", el("h2", heading, *marked), *children, class_=class_)


def prior(class_: str, basis: Basis | None) -> str:
    """The class, marked where the figure is a prior."""
    return f"{class_} prior" if is_prior(basis) else class_


def told(kept: Interval, basis: Basis | None = None) -> Html:
    """A figure over its interval."""
    ends = spread(kept.ci_low, kept.ci_high)
    shown = el("span", percent(kept.mean, basis), class_=prior("figure", basis))
    return joined([shown, el("small", ends, class_="range")] if ends else [shown])


def badge(basis: Basis | None) -> Html:
    """Where a figure comes from."""
    if basis is None:
        return el("span", "no basis: nobody measured or published this", class_="badge unknown")
    label = el("span", basis.kind, class_=f"badge {basis.kind}")
    digest = [" ", el("code", basis.digest)] if basis.digest else []
    return joined([label, " ", basis.source, *digest])


def of_report(report: CompatibilityReport) -> Iterator[Html]:
    """The report's sections, those that hold something."""
    yield headline(report)
    yield facts(report)
    if report.load_times_s or report.estimated_load_time_s is not None:
        yield load_times(report)
    if report.risk_factors:
        yield risks(report)
    if report.actions:
        yield actions(report)
    if report.curves:
        yield curves(report.curves, report.basis)
    if report.kinds:
        yield kinds(report)
    if report.degradation:
        yield degradation(report.degradation)
    if report.conditions:
        yield conditions(report.conditions)


def headline(report: CompatibilityReport) -> Html:
    """Score, level, what to do, and where the estimate comes from."""
    basis, score, kept = report.basis, report.compatibility_score, report.estimated_retention
    says = [el("p", f"{report.source} → {report.target}, {report.tokens:,} tokens", class_="pair")]
    if score is not None:
        level = el("span", report.level or "", class_=prior(f"chip {look(score)}", basis))
        big = el("strong", percent(score, basis), class_=prior("score", basis))
        says += [el("p", big, level, " compatibility score")]
    says.append(el("p", report.recommendation, class_="says"))
    if kept is not None:
        low, high = report.confidence_interval or (kept, kept)
        interval = Interval(mean=kept, ci_low=low, ci_high=high)
        base = charts.base_of(interval)
        name = "published range" if is_prior(basis) else "95 % interval"
        ends = f", {name} {found} %" if (found := spread(low, high)) else ""
        shown = el("span", percent(kept, basis), class_=prior("figure", basis))
        says += [
            el("p", "Estimated retention ", shown, ends),
            charts.scale(interval, basis, base),
            el("p", el("span", f"{100 * base:.0f} %"), el("span", "100 %"), class_="ends"),
        ]
    return card("Estimate", *says, el("p", badge(basis)), wide=True, basis=basis)


def facts(report: CompatibilityReport) -> Html:
    """The published fields, those that nobody knows too."""

    def share(value: float | None, basis: Basis | None = None) -> Html:
        if value is None:
            return UNKNOWN
        about = "~" if is_prior(basis) else ""
        source = el("small", badge(basis)) if basis else ""
        shown = el("span", f"{about}{value:.3f}", class_=prior("figure", basis))
        return joined([shown, source])

    memory = report.target_memory_gb
    rows = {
        "Fact recall, share of native": told(report.facts, report.basis)
        if report.facts
        else UNKNOWN,
        **({"On its own last part": told(report.on_itself, None)} if report.on_itself else {}),
        "Head mapping quality": share(report.head_mapping_quality),
        "Positional compatibility": share(report.positional_compatibility, report.positional_basis),
        "Memory on the target": UNKNOWN if memory is None else size(memory),
        "Tokens": f"{report.tokens:,}",
    }
    items = (el("div", el("dt", name), el("dd", value)) for name, value in rows.items())
    return card("Facts", el("dl", *items))


def size(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.1f} MB"


def load_times(report: CompatibilityReport) -> Html:
    times = dict(report.load_times_s)
    if report.estimated_load_time_s is not None:
        times = {"cold": report.estimated_load_time_s} | times
    longest = max(times.values()) or 1.0
    rows = [(name, (charts.bar(t / longest), seconds(t))) for name, t in times.items()]
    return card("Time to load", table("Time to load", ("memory", "", "estimated"), rows))


def listed(items: Iterable[tuple[str, str, str]]) -> Html:
    """Notes, each with a mark and the mark's class before it."""
    rows = (
        el("li", el("span", mark, class_=f"chip {class_}"), el("span", says))
        for mark, class_, says in items
    )
    return el("ul", *rows, class_="list")


def risks(report: CompatibilityReport) -> Html:
    order = ("high", "medium", "low")
    found = sorted(report.risk_factors, key=lambda risk: order.index(risk.impact))
    return card("Risk factors", listed((r.impact, r.impact, r.description) for r in found))


def actions(report: CompatibilityReport) -> Html:
    def gain(action: Action) -> str:
        if action.gain is None:
            return "gain unknown"
        return f"{100 * action.gain:+.1f} points, {action.basis}"

    found = ((gain(action), action.basis, action.description) for action in report.actions)
    return card("What would raise it", listed(found))


def curves(found: Sequence[Curve], basis: Basis | None) -> Html:
    """The drawing, and its figures as a table."""
    names = [f"last {c.tail} tokens read natively" if c.tail else "the map alone" for c in found]
    marks = (el("li", charts.stroke_mark(i), name) for i, name in enumerate(names))
    known = [dict(zip(c.contexts, c.retention, strict=True)) for c in found]
    rows = [
        (f"{context:,}", [told(k[context], basis) if context in k else "" for k in known])
        for context in sorted({context for k in known for context in k})
    ]
    bands = "published ranges" if is_prior(basis) else "95 % intervals"
    caption = f"Bands are {bands}; 100 % is as good as reading the text."
    legend = el("ul", *marks, class_="legend")
    name = "Retention by length of context"
    return card(
        name,
        el("figure", legend, charts.curves(found), el("figcaption", caption)),
        details(table(name, ("tokens", *names), rows)),
        basis=basis,
    )


def details(content: Html) -> Html:
    return el("details", el("summary", "The figures"), content)


def kinds(report: CompatibilityReport) -> Html:
    name, base = "Retention by kind of text", charts.base_of(*report.kinds.values())
    found = sorted(report.kinds.items(), key=lambda item: -item[1].mean)
    rows = [
        (kind, (charts.scale(kept, report.basis, base), told(kept, report.basis)))
        for kind, kept in found
    ]
    columns = ("kind", f"{100 * base:.0f}\u202f…\u202f100\u202f%", "retention")
    return card(name, table(name, columns, rows), basis=report.basis)


def degradation(found: Sequence[Share]) -> Html:
    """Where the loss comes from: measured shares beside published ones."""
    low = min(0.0, *(share.share.ci_low for share in found))
    high = max(max(share.share.ci_high, share.prior or 0.0) for share in found)
    rows = []
    for share in found:
        name = WITHOUT if share.source == REMAINDER else share.source
        published = UNKNOWN_SHARE
        if share.prior is not None:
            published = el("span", percent(share.prior, PUBLISHED), class_="figure prior")
        drawn = joined([name, charts.signed(share, low, high)])
        rows.append((drawn, (told(share.share), published)))
    caption = (
        "Of what a naive conversion loses, which all of these bind: the part that goes when each "
        "is lifted. Left of the line lifting it does harm; all add up to 100 %. Dotted: the "
        "published share."
    )
    name = "Where the loss comes from"
    shown = table(name, ("source", "measured", "prior"), rows, "shares")
    return card(name, el("figure", shown, el("figcaption", caption)))


def conditions(found: dict[str, dict[str, float]]) -> Html:
    metrics = list(dict.fromkeys(name for known in found.values() for name in known))
    rows = [
        (arm_name(arm), [f"{known[m]:.3f}" if m in known else "" for m in metrics])
        for arm, known in found.items()
    ]
    columns = ("arm", *(METRICS.get(name, name) for name in metrics))
    return card("Five arms", table("Five arms", columns, rows, "numbers"), wide=True)


def arm_name(arm: str) -> str:
    """`memory_tail_48` reads its last 48 tokens natively."""
    kind, _, tail = arm.partition("_tail_")
    name = CONDITIONS.get(kind, kind)
    return f"{name.partition(':')[0]}, last {tail} tokens read natively" if tail else name


def of_heads(found: HeadShares) -> Html:
    strongest = [
        (str(head), (str(found.across[row.argmax()]), f"{100 * row.max():.0f} %"))
        for head, row in zip(found.down, found.shares, strict=True)
    ]
    caption = (
        f"Across: heads of {found.source}; down: heads of {found.target}. K3.0 are the keys of "
        "layer 3, head 0, V values. Stronger: more of the map's weight; the strongest is "
        f"{100 * found.shares.max():.0f} %. The rest of a row is the target's own tokens'."
    )
    columns = (f"head of {found.target}", "listens most to", "share")
    return card(
        "Which heads the map listens to",
        el("figure", charts.heat_map(found), el("figcaption", caption)),
        details(table("The strongest source of each head", columns, strongest)),
    )


def of_matrix(matrix: Matrix) -> Html:
    rows = [
        (named(source), [of_cell(matrix.cell(source, target)) for target in matrix.targets])
        for source in matrix.sources
    ]
    columns = ("source \\ target", *map(named, matrix.targets))
    grid = table("Retention of each source on each target", columns, rows, "matrix")
    wide = len(matrix.targets) > 2
    hint = [el("p", "There are more columns to the right.", class_="hint")] if wide else []
    return card("Compatibility matrix", legend(), *hint, grid, wide=True)


def named(model: str) -> Html:
    """A name that takes a few lines at most."""
    return el("span", model, class_="name", title=model)


def of_cell(cell: Cell | None) -> Html:
    """One pair: a colour for its level, and whether that was measured."""
    if cell is None:
        return el("td")
    if cell.retention is None or cell.basis is None:
        return el("td", "not certified", class_="unknown")
    kind, mean = cell.basis.kind, cell.retention.mean
    note = [] if kind == "measured" else [el("small", kind)]
    says = joined([told(cell.retention, cell.basis), *note])
    return el("td", says, class_=f"{kind} {look(mean)}", title=f"{kind}: {cell.basis.source}")


def legend() -> Html:
    """What a cell's look means."""
    marks: Iterable[tuple[str, str]] = (
        ("key measured l1", "measured by a certificate, with its 95 % interval"),
        ("key prior l1", "prior: published, measured by nobody here"),
        ("key unknown", "a W-Matrix that nobody certified"),
    )
    levels = [
        (f"key {look(max(least, 0) + 0.01)}", f"{name} > {least:.0%}" if least > 0 else name)
        for least, name, _ in LEVELS
    ]
    items = [
        el("li", el("span", class_=class_, aria_hidden="true"), says)
        for class_, says in (*marks, *levels)
    ]
    return el("ul", *items, class_="legend")


def footer() -> Html:
    says = (
        "Retention: 100 % is as good as the target reading the text itself, 0 % no better than no "
        "memory. Measured figures come from certificates in five arms, on their texts. A prior is "
        "a figure that somebody published for models whose weights nobody can get: it decides "
        "nothing."
    )
    return el("footer", el("p", says))
