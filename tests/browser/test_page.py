"""The page in a real browser: it renders in silence, can be read, and loads nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
from playwright.sync_api import Browser, sync_playwright

from awareness_vllm.compatibility.html.page import page

pytestmark = pytest.mark.browser

FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PAGES = {
    "full": page(report=samples.full(name=samples.HOSTILE), heads=samples.heads()),
    "prior": page(report=samples.full(samples.PRIOR)),
    "matrix": page(matrix=samples.store()),
    "empty": page(report=samples.empty()),
    "catalogue": page(catalogue=samples.catalogue()),
}
CONTRASTS = """() => {
  const numbers = text => text.match(/rgba?\\([^)]*\\)/g).map(c => c.match(/[\\d.]+/g).map(Number));
  const light = ([r, g, b]) => {
    const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  // All colours that may lie behind an element: of stripes, each one.
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const {backgroundImage, backgroundColor} = getComputedStyle(e);
      if (backgroundImage.includes('gradient')) return numbers(backgroundImage);
      const [colour] = numbers(backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return [colour];
    }
    return [[255, 255, 255]];
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const texts = [...element.childNodes].filter(node => node.nodeType === 3);
    const own = texts.map(text => text.data.trim()).join('');
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [ink] = numbers(element instanceof SVGElement ? style.fill : style.color);
    for (const ground of behind(element)) {
      const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b);
      found.push({text: own.slice(0, 40), ratio: (high + 0.05) / (low + 0.05)});
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "no chromium: `make browser` installs it"
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root; Playwright, unless it is asked for one, for nobody.
        found = playwright.chromium.launch(
            executable_path=path, args=list(FLAGS), chromium_sandbox=os.geteuid() != 0
        )
        yield found
        found.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens one of PAGES as a file; nothing that it says or asks for may come up until the end."""
    pages, heard = [], []

    def open_page(name: str, width: int = 1280, scheme: Any = "light") -> Any:
        file = tmp_path / f"{name}.html"
        file.write_text(PAGES[name], encoding="utf-8")
        shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        shown.on("console", lambda message: heard.append(f"console: {message.text}"))
        shown.on("pageerror", lambda error: heard.append(f"error: {error}"))
        shown.on(
            "request",
            lambda request: (
                None if request.url == file.as_uri() else heard.append(f"request: {request.url}")
            ),
        )
        shown.goto(file.as_uri())
        shown.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
        pages.append(shown)
        return shown

    yield open_page
    for shown in pages:
        shown.close()
    # The icon is in the page itself: the browser asks nobody for it.
    assert [said for said in heard if said != "request: data:,"] == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 1280])
def test_the_page_never_scrolls_sideways(show: Callable[..., Any], name: str, width: int) -> None:
    shown = show(name, width)
    assert shown.locator("h1").is_visible()
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    # Nothing hangs out of its card either: what is too wide scrolls in a box of its own.
    overhanging = shown.evaluate(
        """[...document.querySelectorAll('.card, .card > *, .card figure > *')]
        .filter(e => e.scrollWidth > e.clientWidth + 1 && !e.matches('.scroll, svg'))
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert overhanging == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(show: Callable[..., Any], name: str, scheme: str) -> None:
    found = show(name, scheme=scheme).evaluate(CONTRASTS)
    assert len(found) > 10
    assert [text for text in found if text["ratio"] < 4.5] == []


def test_dark_is_dark(show: Callable[..., Any]) -> None:
    grounds = {
        scheme: show("full", scheme=scheme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for scheme in ("light", "dark")
    }
    assert grounds == {"light": "rgb(243, 245, 248)", "dark": "rgb(15, 21, 27)"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_measured_and_prior_cells_look_different(show: Callable[..., Any], scheme: str) -> None:
    shown = show("matrix", scheme=scheme)
    look = """cell => {
      const frame = getComputedStyle(cell);
      const figure = getComputedStyle(cell.querySelector('.figure'));
      return [frame.backgroundImage.split('(')[0], frame.outlineStyle, figure.fontStyle,
              figure.fontWeight];
    }"""
    for class_, expected in (
        ("measured", ["none", "solid", "normal", "700"]),
        ("prior", ["repeating-linear-gradient", "dashed", "italic", "400"]),
    ):
        cells = shown.locator(f"td.{class_}").all()
        assert cells
        assert {tuple(cell.evaluate(look)) for cell in cells} == {tuple(expected)}
    fills = shown.locator("td.measured").evaluate_all(
        "cells => cells.map(c => getComputedStyle(c).backgroundColor)"
    )
    assert len(set(fills)) == 4, "each level of retention has a colour of its own"


def test_an_estimate_by_a_prior_does_not_look_measured(show: Callable[..., Any]) -> None:
    looks = {}
    for name in ("full", "prior"):
        card = show(name).locator(".card").first
        looks[name] = [
            card.locator(".score").evaluate("e => getComputedStyle(e).fontStyle"),
            card.evaluate("e => getComputedStyle(e).borderTopStyle"),
            card.locator(".badge").last.inner_text(),
        ]
    assert looks == {
        "full": ["normal", "solid", "measured"],
        "prior": ["italic", "dashed", "prior"],
    }


@pytest.mark.parametrize("name", ["full", "matrix"])
def test_a_name_is_a_text_and_nothing_else(show: Callable[..., Any], name: str) -> None:
    shown = show(name)
    assert samples.HOSTILE in shown.locator("body").inner_text()
    assert shown.locator("script, img, [onerror]").count() == 0
    assert shown.title() != "taken"


@pytest.mark.parametrize("width", [360, 1280])
def test_drawings_hold_their_letters(show: Callable[..., Any], width: int) -> None:
    drawings = show("full", width).locator("svg[role=img]")
    assert drawings.count() == 2
    outside = drawings.evaluate_all(
        """all => all.flatMap(drawing => {
          const frame = drawing.getBoundingClientRect();
          return [...drawing.querySelectorAll('text')].filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1
                || box.top < frame.top || box.bottom > frame.bottom || box.height < 12;
          }).map(text => text.textContent);
        })"""
    )
    assert outside == []


def test_the_catalogue_is_searched_and_filtered(show: Callable[..., Any]) -> None:
    shown = show("catalogue")
    items, count = shown.locator("#items > li"), shown.locator("#count")

    def choose(**filters: Any) -> tuple[str, list[str]]:
        """What is found with some filters and no others."""
        shown.get_by_role("button", name="Reset").click()
        for label, value in filters.items():
            field = shown.locator(f"#{label}")
            if value is True:
                field.check()
            elif label in ("kind", "source", "target", "sort"):
                field.select_option(label=value)
            else:
                field.fill(value)
        return count.inner_text(), shown.locator("#items .title").all_inner_texts()

    assert choose()[0] == "60 memories and 2 maps, the first 50 shown"
    shown.get_by_role("button", name="Show more").focus()
    shown.keyboard.press("Enter")
    assert (items.count(), count.inner_text()) == (62, "60 memories and 2 maps")
    assert shown.evaluate(
        "document.activeElement.closest('li') === document.querySelectorAll('#items > li')[50]"
    )
    assert choose(text="GARDENING chapter") == ("1 memory", ["Report 7"])
    assert choose(text="f" * 3, kind="maps")[0] == "Nothing fits: take a filter back."
    assert choose(kind="maps", certified=True) == ("1 map", ["smollm2-135m--gemma3-270m"])
    # On paste the command is what the page says that it is.
    shown.locator("#items summary").click()
    shown.get_by_role("button", name="Copy").click()
    shown.locator("#count", has_text="copied").wait_for()
    command = shown.get_by_label("Command").input_value()
    assert command.startswith("awareness pull oci://registry.example.com/a/b:pair_")
    shown.locator("#text").focus()
    shown.keyboard.press("Control+V")
    assert shown.locator("#text").input_value() == command
    assert choose(least="1900", most="2000") == ("2 memories", ["Report 18", "Report 19"])
    # The target's own memories are read there, and those from which a map leads there.
    assert choose(target="gemma3-270m", kind="memories")[0].startswith("60 memories")
    # A latent is for its map's target alone, and of another map's figures it has none.
    assert choose(target="smollm2-135m", kind="memories")[0] == "18 memories"
    assert choose(target="gemma3-270m", certified=True, kind="memories")[0] == "19 memories"
    assert choose(source=samples.HOSTILE)[0] == "20 memories and 1 map"
    assert choose(sort="tokens, most first")[1][0] == "Report 59"
    assert choose(sort="measured, newest first", kind="maps")[1][0] == "smollm2-135m--gemma3-270m"
    assert choose(sort="retention, best first")[1][0] == samples.HOSTILE
