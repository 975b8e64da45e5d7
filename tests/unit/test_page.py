"""The page's text: what is in it, what is not, and how each figure is marked."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest
import samples
from markupsafe import escape

import awareness_vllm.compatibility.html as html_package
from awareness_vllm.compatibility.html.page import page
from awareness_vllm.compatibility.report import Matrix

pytestmark = pytest.mark.unit

VOID = {"meta", "link"}


class Nested(HTMLParser):
    """Fails where an element is not closed in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def headings(html: str) -> list[str]:
    return [re.sub("<.*?>", "", found) for found in re.findall("<h2>(.*?)</h2>", html)]


@pytest.mark.parametrize(
    "html",
    [
        page(report=samples.full(name=samples.HOSTILE), heads=samples.heads()),
        page(report=samples.empty()),
        page(matrix=samples.store()),
        page(),
    ],
    ids=["full", "empty", "matrix", "nothing"],
)
def test_the_document_is_whole_and_asks_for_nothing(html: str) -> None:
    parser = Nested()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert not {"script", "img", "iframe", "object"} & parser.seen
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|@import|url\(", html)


def test_what_is_known_has_a_section() -> None:
    html = page(report=samples.full(), matrix=samples.store(), heads=samples.heads())
    assert headings(html) == [
        "Estimate",
        "Facts",
        "Time to load",
        "Risk factors",
        "What would raise it",
        "Retention by length of context",
        "Retention by kind of text",
        "Where the loss comes from",
        "Five arms",
        "Which heads the map listens to",
        "Compatibility matrix",
    ]
    assert headings(page(report=samples.empty())) == ["Estimate", "Facts"]


def test_the_headline_says_how_it_is_known() -> None:
    measured, prior = page(report=samples.full()), page(report=samples.full(samples.PRIOR))
    assert "95 % interval 88.5 … 93.9 %" in measured
    assert f"<code>{samples.DIGEST}</code>" in measured
    assert '<strong class="score">91.2 %' in measured
    assert '<strong class="score prior">~91.2 %' in prior
    assert "published range 88.5 … 93.9 %" in prior
    assert "95 % interval" not in prior
    assert "no basis" in page(report=samples.empty())


def test_figures_of_a_prior_report_are_all_priors() -> None:
    report = samples.full(samples.PRIOR).model_copy(update={"degradation": ()})
    figures = set(re.findall('class="figure[^"]*">[^<]*%', page(report=report)))
    assert figures
    assert all('class="figure prior">~' in found for found in figures)


def test_a_cell_shows_what_it_is() -> None:
    html = page(matrix=samples.store())
    assert re.search('<td class="measured l2"[^>]*><span class="figure">89.4 %', html)
    assert re.search('<td class="prior l0"[^>]*><span class="figure prior">~99 %', html)
    assert '<td class="unknown">not certified</td>' in html
    assert "<td></td>" in html


def test_every_text_is_escaped() -> None:
    for html in (
        page(report=samples.hostile()),
        page(matrix=samples.store()),
        page(matrix=Matrix(sources=(samples.HOSTILE,), targets=(samples.HOSTILE,), cells=())),
        page(heads=replace(samples.heads(), source=samples.HOSTILE, target=samples.HOSTILE)),
    ):
        assert samples.HOSTILE not in html
        assert escape(samples.HOSTILE) in html
        parser = Nested()
        parser.feed(html)
        assert not {"script", "img"} & parser.seen


def test_every_text_of_a_report_is_shown() -> None:
    report = samples.hostile()
    fields = re.findall(r"(\w+) <script>", str(report.model_dump()))
    assert len(fields) == 14
    html = page(report=report)
    assert [field for field in fields if f"{field} {escape(samples.HOSTILE)}" not in html] == []


def test_no_template_switches_escaping_off() -> None:
    templates = list(files(html_package).joinpath().iterdir())
    texts = [t.read_text(encoding="utf-8") for t in templates if t.name.endswith(".j2")]
    assert texts
    assert not [text for text in texts if re.search(r"\|\s*safe\b|autoescape", text)]


def test_one_length_of_context_is_drawn_as_whiskers() -> None:
    report = samples.full()
    curves = [
        c.model_copy(update={"contexts": c.contexts[:1], "retention": c.retention[:1]})
        for c in report.curves[:2]
    ]
    html = page(report=report.model_copy(update={"curves": tuple(curves)}))
    assert "<polygon" not in html
    assert "NaN" not in html
    drawing = html[html.index('role="img"') :].split("</svg>")[0]
    assert len(set(re.findall('<circle cx="([^"]*)"', drawing))) == 2, "beside each other"


def test_a_share_below_nothing_is_drawn_to_the_left() -> None:
    html = page(report=samples.full())
    section = html[html.index("Where the loss comes from") :].partition("</section>")[0]
    # From -13 % to 70 %: nothing stands at 13 of 83.
    below = re.search(r'<i style="left:([\d.]+)%;width:([\d.]+)%" class="below">', section)
    assert below
    assert [float(end) for end in below.groups()] == pytest.approx([4.82, 10.84], abs=0.01)
    zeros = re.findall(r'<i style="left:([\d.]+)%;width:0.00%" class="zero">', section)
    assert zeros == ["15.66"] * 6
    assert section.count('class="above"') == 5
    assert "-9.0 %" in section


def test_the_remainder_is_named_and_has_no_prior() -> None:
    html = page(report=samples.full())
    section = html[html.index("Where the loss comes from") :].partition("</section>")[0]
    *_, source, last = re.findall("<tr>.*?</tr>", section, re.DOTALL)
    assert "left with all of them lifted" in last
    assert "none" in last
    assert 'class="mark"' not in last
    assert 'class="mark"' in source
