"""The report in a browser: every figure is drawn, nothing is cut off, nothing complains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from browser import CHROMIUM, Browser
from reported import full_results, several_tasks

from slipstream.decode.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PHONE, DESK = 390, 1200
# Elements that reach beyond the window, but for those in a region that scrolls by itself and those in figures (CUT).
BEYOND = """[...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll") && !e.ownerSVGElement)
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML)"""
# Of every figure its name, its size on the page, and how many marks of it have an extent.
DRAWN = """[...document.querySelectorAll("svg")].map(figure => [
    figure.closest("section").id, figure.getBoundingClientRect().width, figure.getBoundingClientRect().height,
    [...figure.querySelectorAll("path, use")].filter(mark => {
        const box = mark.getBoundingClientRect(); return box.width + box.height > 0 }).length])"""
# Words of figures that are cut off at an edge; fonts differ by some pixels from those the figure was laid out with.
CUT = """[...document.querySelectorAll("svg text")].filter(word => {
    const box = word.getBoundingClientRect(), figure = word.closest("svg").getBoundingClientRect();
    return box.left < figure.left - 4 || box.right > figure.right + 4 || box.top < figure.top - 4
        || box.bottom > figure.bottom + 4 }).map(word => word.textContent)"""
ARTICLES = """[...document.querySelectorAll("article")].map(e => [
    e.getBoundingClientRect().left, e.getBoundingClientRect().top])"""
COLOURS = """["exact", "relaxed", "bonus"].map(tag =>
    getComputedStyle(document.querySelector(".tokens ." + tag)).backgroundColor)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, results in (("one", full_results()), ("several", several_tasks())):
        write_report(folder / f"{name}.html", results)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["one", "several"])
def test_every_figure_is_drawn_and_nothing_overflows(browser: Any, pages, name: str, width: int) -> None:
    browser.complaints.clear()
    browser.open(pages[name], width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(BEYOND) == []
    drawn = browser.evaluate(DRAWN)
    assert len(drawn) == 10 + (name == "several")
    for figure, wide, high, marks in drawn:
        assert wide > 300, figure
        assert high > 60, figure
        assert marks > 10, figure
    assert browser.evaluate(CUT) == []
    assert browser.complaints == []


def test_answers_stand_side_by_side_where_there_is_room(browser, pages):
    browser.open(pages["one"], DESK)
    (left, top), (other_left, other_top) = browser.evaluate(ARTICLES)
    assert (top, left < other_left) == (other_top, True)
    browser.open(pages["one"], PHONE)
    (left, top), (other_left, other_top) = browser.evaluate(ARTICLES)
    assert (left, top < other_top) == (other_left, True)
    assert len(set(browser.evaluate(COLOURS))) == 3


def test_a_bad_page_is_noticed(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width: 500px">wide</div>'
        "<svg width=400 height=100><text x=390 y=50>cut off</text></svg>"
        '<script>console.error("bad news"); throw new Error("worse")</script><img src="nowhere.png">'
    )
    browser.complaints.clear()
    browser.open(page, PHONE)
    assert browser.evaluate("document.documentElement.scrollWidth") >= 500
    assert len(browser.evaluate(BEYOND)) == 2  # the wide one and the figure
    assert browser.evaluate(CUT) == ["cut off"]
    said = " ".join(browser.complaints)
    assert "bad news" in said
    assert "Uncaught" in said
    assert "ERR_FILE_NOT_FOUND" in said
