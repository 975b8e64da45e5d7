"""A report and a matrix as one page to look at: no script, nothing loaded, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

from awareness_vllm.compatibility import charts
from awareness_vllm.compatibility.figures import (
    figure,
    is_prior,
    look,
    percent,
    seconds,
    spread,
)
from awareness_vllm.compatibility.markup import Html, el, joined, table
from awareness_vllm.compatibility.report import (
    LEVELS,
    Basis,
    Cell,
    CompatibilityReport,
    Curve,
    Matrix,
)
from awareness_vllm.wmatrix.certificate import Interval

if TYPE_CHECKING:
    from awareness_vllm.wmatrix.heat_map import HeadShares

UNKNOWN = el("span", "nobody knows", class_="unknown")
ARMS = {
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


def card(heading: str, *children: str, wide: bool = False) -> Html:
    return el("section", el("h2", heading), *children, class_="card wide" if wide else "card")


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
        yield curves(report.curves)
    if report.kinds:
        yield kinds(report)
    if report.degradation:
        yield degradation(report)
    if report.arms:
        yield arms(report)


def headline(report: CompatibilityReport) -> Html:
    """Score, level, what to do, and where the estimate comes from."""
    basis, score, kept = report.basis, report.compatibility_score, report.estimated_retention
    says = [el("p", f"{report.source} → {report.target}, {report.tokens:,} tokens", class_="pair")]
    if score is not None:
        level = el("span", report.level or "", class_=f"chip {look(score)}")
        big = el("strong", percent(score, basis), class_=prior("score", basis))
        says.append(el("p", big, level))
    says.append(el("p", report.recommendation, class_="says"))
    if kept is not None:
        low = kept if report.ci_low is None else report.ci_low
        high = kept if report.ci_high is None else report.ci_high
        interval = Interval(mean=kept, ci_low=low, ci_high=high)
        base = charts.base_of(interval)
        ends = spread(low, high)
        name = "published range" if is_prior(basis) else "95 % interval"
        told = el("span", percent(kept, basis), class_=prior("figure", basis))
        says += [
            el("p", "Retention ", told, f", {name} {ends} %" if ends else ""),
            charts.scale(interval, basis, base),
            el("p", el("span", f"{100 * base:.0f} %"), el("span", "100 %"), class_="ends"),
        ]
    return card("Estimate", *says, el("p", badge(basis)), wide=True)


def prior(class_: str, basis: Basis | None) -> str:
    """The class, marked where the figure is a prior."""
    return f"{class_} prior" if is_prior(basis) else class_


def badge(basis: Basis | None) -> Html:
    """Where a figure comes from."""
    if basis is None:
        return el("span", "no basis: nobody measured or published this", class_="badge unknown")
    label = el("span", basis.kind, class_=f"badge {basis.kind}")
    digest = [" ", el("code", basis.digest)] if basis.digest else []
    return joined([label, " ", basis.source, *digest])


def facts(report: CompatibilityReport) -> Html:
    """The published fields, those that nobody knows too."""

    def share(value: float | None) -> str:
        return UNKNOWN if value is None else f"{value:.3f}"

    memory = report.target_memory_gb
    positions = share(report.positional_compatibility)
    if report.positional_basis:
        positions = joined([positions, " ", badge(report.positional_basis)])
    rows = {
        "Fact recall, share of native": figure(report.facts) if report.facts else UNKNOWN,
        "Head mapping quality": share(report.head_mapping_quality),
        "Positional compatibility": positions,
        "Memory on the target": UNKNOWN if memory is None else size(memory),
        "Tokens": f"{report.tokens:,}",
    }
    items = [el("div", el("dt", name), el("dd", value)) for name, value in rows.items()]
    return card("Facts", el("dl", *items))


def size(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.1f} MB"


def load_times(report: CompatibilityReport) -> Html:
    times = dict(report.load_times_s)
    if report.estimated_load_time_s is not None:
        times = {"cold": report.estimated_load_time_s} | times
    longest = max(times.values()) or 1.0
    rows = [(name, (charts.bar(t / longest), seconds(t))) for name, t in times.items()]
    return card("Time to load", table("Estimated by how warm the memory is", ("", "", ""), rows))


def risks(report: CompatibilityReport) -> Html:
    order = ("high", "medium", "low")
    found = sorted(report.risk_factors, key=lambda risk: order.index(risk.impact))
    items = [
        el(
            "li",
            el("span", risk.impact, class_=f"chip {risk.impact}"),
            el("span", risk.description),
        )
        for risk in found
    ]
    return card("Risk factors", el("ul", *items, class_="list"))


def actions(report: CompatibilityReport) -> Html:
    items = []
    for action in report.actions:
        gain = "gain unknown" if action.gain is None else f"{100 * action.gain:+.1f} points"
        note = "" if action.gain is None else f" ({action.basis})"
        items.append(
            el("li", el("span", gain + note, class_="chip"), el("span", action.description))
        )
    return card("What would raise it", el("ul", *items, class_="list"))


def curves(found: tuple[Curve, ...]) -> Html:
    """The drawing, and its figures as a table."""
    names = ["the map alone" if c.tail == "0" else f"last {c.tail} read natively" for c in found]
    marks = (el("li", charts.stroke_mark(i), name) for i, name in enumerate(names))
    known = [dict(zip(c.contexts, c.retention, strict=True)) for c in found]
    rows = [
        (f"{context:,}", [figure(k[context]) if context in k else "" for k in known])
        for context in sorted({context for k in known for context in k})
    ]
    return card(
        "Retention by length of context",
        el(
            "figure",
            el("ul", *marks, class_="legend"),
            charts.curves(found),
            el("figcaption", "Bands are 95 % intervals; 100 % is as good as reading the text."),
        ),
        details(table("Retention by tokens of context", ("tokens", *names), rows)),
    )


def details(content: Html) -> Html:
    return el("details", el("summary", "The figures"), content)


def kinds(report: CompatibilityReport) -> Html:
    base = charts.base_of(*report.kinds.values())
    rows = [
        (kind, (charts.scale(kept, None, base), figure(kept)))
        for kind, kept in sorted(report.kinds.items(), key=lambda item: -item[1].mean)
    ]
    columns = ("kind", f"{100 * base:.0f} … 100 %", "retention (95 % interval)")
    return card("Retention by kind of text", table("Retention by kind of text", columns, rows))


def degradation(report: CompatibilityReport) -> Html:
    """Where the loss comes from: measured shares beside published ones."""
    found = report.degradation
    bars = (
        el("p", el("span", "measured", class_="badge measured")),
        charts.stack([share.share.mean for share in found], "measured"),
        el("p", el("span", "prior", class_="badge prior")),
        charts.stack([share.prior for share in found], "prior"),
    )
    published = Basis(kind="prior", source="")
    rows = []
    for i, share in enumerate(found):
        mark = el("span", class_=f"dot c{i % charts.COLOURS}", aria_hidden="true")
        told = el("span", percent(share.prior, published), class_="figure prior")
        rows.append((joined([mark, share.source]), (figure(share.share), told)))
    columns = ("source", "measured (95 % interval)", "prior")
    shares = table("Shares of the whole loss", columns, rows)
    return card("Where the loss comes from", el("figure", *bars), shares)


def arms(report: CompatibilityReport) -> Html:
    metrics = list(dict.fromkeys(name for arm in report.arms.values() for name in arm))
    rows = [
        (arm_name(arm), [f"{known[m]:.3f}" if m in known else "" for m in metrics])
        for arm, known in report.arms.items()
    ]
    columns = ("arm", *(METRICS.get(name, name) for name in metrics))
    return card("Five arms", table("What each arm says", columns, rows, "numbers"), wide=True)


def arm_name(arm: str) -> str:
    """`memory_tail_48` reads its last 48 tokens natively."""
    kind, _, tail = arm.partition("_tail_")
    return f"{ARMS.get(kind, kind)}, last {tail} read natively" if tail else ARMS.get(arm, arm)


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
        (source, [of_cell(matrix.cell(source, target)) for target in matrix.targets])
        for source in matrix.sources
    ]
    caption = "Retention of a memory of each source (rows) on each target (columns)"
    columns = ("source \\ target", *matrix.targets)
    grid = table(caption, columns, rows, "matrix")
    return card("Compatibility matrix", legend(), grid, wide=True)


def of_cell(cell: Cell | None) -> Html:
    """One pair: a colour for its level, and whether that was measured."""
    if cell is None:
        return el("td")
    if cell.retention is None or cell.basis is None:
        return el("td", "not certified", class_="unknown")
    kept, basis = cell.retention, cell.basis
    note = " ".join(filter(None, (spread(kept.ci_low, kept.ci_high),)))
    under = f"prior {note}".strip() if is_prior(basis) else note or basis.kind
    shown = (el("span", percent(kept.mean, basis), class_="figure"), el("small", under))
    class_ = f"{basis.kind} {look(kept.mean)}"
    return el("td", *shown, class_=class_, title=" ".join((basis.kind, basis.source)))


def legend() -> Html:
    """What a cell's look means."""
    marks: Iterable[tuple[str, str]] = (
        ("key measured l1", "measured by a certificate, with its 95 % interval"),
        ("key prior l1", "prior: published, measured by nobody here"),
        ("key unknown", "a W-Matrix that nobody certified"),
    )
    levels = [(f"key {look(max(least, 0) + 0.01)}", name) for least, name, _ in LEVELS]
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
